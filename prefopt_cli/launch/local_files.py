"""Files here that a recipe names, and which of them SkyPilot's machines will not have."""

import json
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefopt_cli.launch.skypilot_mounts import WORKDIR, Mount, mount_of, place_of
from prefopt_cli.recipe.schema import (
    Recipe,
    SelfSupervisedSettings,
    SequentialSettings,
    SoftSettings,
    place_of_alignment,
)
from prefopt_cli.recipe.schemes import has_scheme
from prefopt_cli.recipe.stopwords import stopwords_file
from prefopt_cli.runs.environment import PACKAGES

INSTALLED = {"prefopt_cli", *PACKAGES}
"""Modules that the machines have."""


def absent_files(recipe_path: str, recipe: Recipe, mounts: Sequence[Mount]) -> list[str]:
    """What the recipe needs and the machines will not have, a sentence each with what brings it there.

    Args:
        recipe_path: of a file in the present folder, which is what is copied.
        recipe: what it and its overrides make together.
        mounts: what else the machines have.
    """
    left_out = _left_out()
    found: list[str] = []
    for key, path in _named(recipe):
        if _is_path(path) and (why := _why_absent(path, mounts, left_out)):
            found.append(f"{key} {path} {why}")
    for path, base in _bases(recipe):
        if mount_of(base, mounts) is None:
            found.append(
                f"{base}, the base model of the adapter {path}, is looked for there under this very path. Add "
                f"{_mount_line(base)}"
            )
    beside = Path(recipe_path).expanduser()
    found += _own_loss(recipe, beside.parent, left_out)
    if _is_left_out(_within(beside), left_out):
        found.append(f"The recipe {recipe_path} {IGNORED}")
    return found


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Settings that may name files, with what they name."""
    model, data, method = recipe.model, recipe.dataset, recipe.method
    yield "model.name_or_path", model.name_or_path
    if model.chat_template is not None:
        yield "model.chat_template", model.chat_template
    sources = {
        "dataset.train": data.train,
        **{f"dataset.eval.{name}": each for name, each in data.eval.items()},
    }
    alignment, key = method.alignment, place_of_alignment(method)
    if isinstance(alignment, SoftSettings) and alignment.regularizer.prompts:
        sources[f"{key}.regularizer.prompts"] = alignment.regularizer.prompts
    for place, several in sources.items():
        for number, source in enumerate(several):
            yield f"{place}.{number}.source", source.source
    if isinstance(alignment, SequentialSettings):
        for number, run in enumerate(alignment.previous):
            yield f"{key}.previous.{number}", run
    words = method.stopwords if isinstance(method, SelfSupervisedSettings) else None
    if isinstance(words, str) and stopwords_file(words):
        yield "method.stopwords", words
    if recipe.launch.config is not None:
        yield "launch.config", recipe.launch.config
    if isinstance(settings := recipe.training.get("accelerator_config"), str):
        yield "training.accelerator_config", settings


def _is_path(name: str) -> bool:
    """Whether it is a file or folder rather than something of the hub's or of a scheme's."""
    surely = name.startswith(("/", "~", "./", "../"))
    return not has_scheme(name) and (surely or Path(name).expanduser().exists())


def _bases(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Local folders that local adapters lie on, which an adapter's own file names: (adapter, base)."""
    alignment = recipe.method.alignment
    runs = alignment.previous if isinstance(alignment, SequentialSettings) else []
    for name in dict.fromkeys([recipe.model.name_or_path, *runs]):
        folder = Path(name).expanduser()
        origin = _read(folder / "manifest.json").get("lineage")
        if isinstance(origin, dict) and has_scheme(
            str(origin.get("name"))
        ):  # made anew wherever it is missing
            continue
        for settings in (folder / "adapter_config.json", folder / "model/adapter_config.json"):
            base = _read(settings).get("base_model_name_or_path")
            if isinstance(base, str) and Path(base).is_absolute() and Path(base).exists():
                yield name, base


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _why_absent(path: str, mounts: Sequence[Mount], left_out: Sequence[str]) -> str | None:
    """Why the machines will not have what is here under a path, and what to do; None where they will."""
    if mount_of(path, mounts) is not None:
        return None
    local, place = Path(path).expanduser(), place_of(path)
    inside, free = _within(local), path.startswith(("/", "~"))
    if inside is not None:
        if free:
            return f"lies elsewhere on the machines, in {WORKDIR}. Write {inside} in the recipe."
        return IGNORED if _is_left_out(inside, left_out) else None
    if not free and place.is_relative_to(WORKDIR):
        return "leads out of the present folder by a link, which is copied as a link. Copy what it leads to there."
    if not free and not place.is_relative_to("~"):
        return "lies outside the present folder, which is what is copied. Copy it there."
    if not local.exists():
        return (
            "is not here, and lies in no mount. Unless the machines have it already, mount what holds it: "
            f"--mount {shlex.quote(f'{place.parent}=s3://BUCKET')}"
        )
    return f"lies outside the present folder, which is what is copied. Add {_mount_line(path)}"


def _mount_line(path: str) -> str:
    return f"--mount {shlex.quote(f'{place_of(path)}={path}')}"


def _within(path: Path) -> str | None:
    """The path from the present folder, where it leads to something in it."""
    here = Path.cwd().resolve()
    found = path.resolve()
    return str(found.relative_to(here)) if found.is_relative_to(here) else None


def _own_loss(recipe: Recipe, folder: Path, left_out: Sequence[str]) -> list[str]:
    """What is wrong with a user's own f: its module must come along beside the recipe."""
    module, colon, _ = getattr(recipe.method.alignment, "loss", "").partition(":")
    top = module.partition(".")[0]
    if not colon or top in INSTALLED:
        return []
    key = f"{place_of_alignment(recipe.method)}.loss: the module {top}"
    beside = next((path for path in (folder / f"{top}.py", folder / top) if path.exists()), None)
    if beside is None:
        return [
            f"{key} is not beside the recipe and is not installed on the machines. Put its file beside the recipe."
        ]
    return [f"{key} {IGNORED}"] if _is_left_out(_within(beside), left_out) else []


IGNORED = (
    "is ignored by git, and what git ignores is not copied. Write a file .skyignore with what may stay here; SkyPilot "
    "then goes by that instead."
)


def _left_out() -> list[str]:
    """Files and folders of the present folder that are not copied; git is asked just as SkyPilot asks it."""
    if Path(".skyignore").exists():
        return []
    command = ["git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError):  # no git, or no repository
        return []
    found = [item.rstrip("/") for item in done.stdout.split("\0") if item]
    return [] if "." in found else found  # where all is ignored, SkyPilot copies all


def _is_left_out(path: str | None, left_out: Sequence[str]) -> bool:
    """Whether git ignores a file, the folder that it lies in, or something in the folder that it is."""
    if path is None:
        return False
    place = Path(path)
    return any(place.is_relative_to(item) or Path(item).is_relative_to(place) for item in left_out)
