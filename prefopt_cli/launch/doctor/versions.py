"""Versions of Python and of the packages, against what prefopt asks for; nothing is imported but their metadata."""

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import prefopt_cli
from prefopt_cli.launch.doctor.finding import Finding, note, ok, problem
from prefopt_cli.runs.environment import PACKAGES

DISTRIBUTION = "prefopt"

OPTIONAL = {
    "deepspeed": ("launch.engine: deepspeed", "pip install deepspeed"),
    "kernels": ("attention kernels from the hub", "pip install kernels"),
}
"""Packages that only some recipes need: what for, and how to have them."""


def versions() -> Iterator[Finding]:
    """Python, prefopt, what it requires, and what some recipes need besides."""
    yield _python()
    yield ok(f"prefopt {prefopt_cli.__version__}")
    try:
        required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield note("prefopt runs from a folder and is not installed", "pip install -e . (in that folder)")
        return
    plain = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = of_package(requirement)
        if found.state == "ok" and requirement.name not in PACKAGES:
            plain.append(requirement.name)
        else:
            yield found
    if plain:
        yield ok(f"{len(plain)} more packages are as prefopt asks for: {', '.join(plain)}")
    yield from map(_optional, OPTIONAL)


def _python() -> Finding:
    version = platform.python_version()
    try:
        asked = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except (metadata.PackageNotFoundError, KeyError):
        asked = ""
    if not SpecifierSet(asked).contains(version, prereleases=True):
        return problem(
            f"Python {version}; prefopt needs {asked}",
            "make an environment with another Python: python3.12 -m venv .venv",
        )
    return ok(f"Python {version}")


def of_package(requirement: Requirement) -> Finding:
    """Whether a package is there in a version that meets a requirement."""
    name, asked = requirement.name, requirement.specifier
    install = f'pip install "{name}{asked}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return problem(f"{name} is not installed", install)
    if not asked.contains(version, prereleases=True):
        return problem(f"{name} {version}; prefopt needs {asked}", install)
    return ok(f"{name} {version}")


def _optional(name: str) -> Finding:
    purpose, install = OPTIONAL[name]
    try:
        return ok(f"{name} {metadata.version(name)}", feature=name)
    except metadata.PackageNotFoundError:
        return note(f"{name} is not installed; it is for {purpose}", install, feature=name)
