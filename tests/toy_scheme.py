"""A second scheme, served in no time: what holds of every scheme is tested on it (see the fixture `toy_scheme`)."""

from pathlib import Path
from typing import Any

import datasets

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schemes import Progress

ROWS = [
    {"id": f"q{n}", "prompt": f"Question {n}?", "chosen": f" Yes {n}", "rejected": f" No {n}"}
    for n in range(10)
]


def check_model(name: str) -> None:
    """Any folder is a model."""
    if not name.startswith("/"):
        raise UserError(f"toy:{name} is no folder")


def check_dataset(name: str, config: str | None) -> None:
    """There is one dataset."""
    if name.partition("/")[0] != "rows" or config not in (None, "plain"):
        raise UserError(f"toy:{name}: there is no such toy ({config})")


def model_folder(name: str, progress: Progress | None) -> Path:
    """A folder with a configuration."""
    if progress:
        progress("making a toy model", 1, 1)
    Path(name).mkdir(parents=True, exist_ok=True)
    Path(name, "config.json").write_text("{}")
    return Path(name)


def dataset(name: str, config: str | None, progress: Progress | None) -> dict[str, Any]:
    """Ten rows to train on and the first three of them to test on."""
    check_dataset(name, config)
    if progress:
        progress("making toy rows", 10, 10)
    whole = datasets.Dataset.from_list(ROWS)
    return {"train": whole, "test": whole.select(range(3))}
