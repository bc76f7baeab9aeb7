"""How another machine installs what is installed here: torch first, the same versions, and prefopt from where it is."""

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import prefopt_cli
from prefopt_cli.runs.environment import PACKAGES

DISTRIBUTION = "prefopt"


@dataclass(frozen=True)
class Installation:
    """What to hand to pip, in order."""

    first: list[str]
    """torch alone: any other order may pull another build of several gigabytes."""
    then: list[str]
    """The other packages that decide a run's numbers."""
    prefopt: str
    """A requirement for pip; empty where there is a folder."""
    folder: Path | None
    """The source folder that prefopt is installed from here, which must be copied to the machine."""


def installation() -> Installation:
    """The installation at hand."""
    pinned = []
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        # What follows a plus tells of one machine's build: +cpu, +cu128.
        pinned.append(f"{name}=={version.partition('+')[0]}")
    folder, requirement = _origin()
    first = [each for each in pinned if each.startswith("torch==")]
    then = [each for each in pinned if each not in first]
    return Installation(first, then, requirement, folder)


def _origin() -> tuple[Path | None, str]:
    """Where prefopt was installed from (PEP 610): a folder, or something that pip can fetch."""
    released = f"{DISTRIBUTION}=={prefopt_cli.__version__}"
    try:
        record = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:  # it runs from its source folder
        record = {"url": Path(prefopt_cli.__file__).parent.parent.as_uri(), "dir_info": {}}
    except ValueError:
        return None, released
    url = record.get("url", "")
    if "vcs_info" in record:
        revision = record["vcs_info"]["commit_id"]
        return None, f"{DISTRIBUTION} @ {record['vcs_info']['vcs']}+{url}@{revision}"
    folder = Path(unquote(urlsplit(url).path))
    if "dir_info" in record and (folder / "pyproject.toml").is_file():
        return folder, ""
    return None, released
