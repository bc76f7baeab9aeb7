"""What a run depends on besides its recipe: versions, machine, source revision."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import prefopt_cli

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of prefopt, Python and the libraries that decide a run's numbers."""
    found = {"prefopt": prefopt_cli.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor and accelerators; no host name."""
    facts: dict[str, Any] = {"system": platform.system(), "processor": platform.machine()}
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        facts["threads"] = torch.get_num_threads()
        facts["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that `folder` is in, and whether it had uncommitted changes."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {
            "commit": commit,
            "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
