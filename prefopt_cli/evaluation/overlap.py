"""Which prompts a policy was trained on, so that held-out sets that hold some of them are told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt_cli import data
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.held_out import HeldOutSet, prompt_key
from prefopt_cli.models.ancestry import line_of
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import DatasetSettings
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Reporter

UNCHECKED = "Not checked whether the prompts occur in the training data"


@dataclass(frozen=True)
class Trained:
    """Prompts that a policy was trained on."""

    keys: frozenset[bytes] | None
    """Digests of their words; None where they cannot be known."""
    reason: str | None = None
    """Why not."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader has to know."""
        return (f"{UNCHECKED}: {self.reason}.",) if self.reason else ()


class TrainingPrompts:
    """Reads the training data of runs and of those before them; data that several share is read once."""

    def __init__(self, runs: RunFinder, reporter: Reporter) -> None:
        self._runs = runs
        self._reporter = reporter
        self._known: list[tuple[DatasetSettings, frozenset[bytes], list[tuple[str, int]]]] = []

    def of(self, run: RunFolder | None) -> Trained:
        """The prompts of a run and the runs before it in its line."""
        if run is None:
            return Trained(None, "no run tells what the model was trained on")
        found: set[bytes] = set()
        try:
            for each in line_of(run, self._runs):
                found |= self._of_one(each)
        except UserError as error:
            return Trained(None, " ".join(str(error).split()).rstrip("."))
        return Trained(frozenset(found))

    def _of_one(self, run: RunFolder) -> frozenset[bytes]:
        """Raises UserError where the data is gone, or is not what it was."""
        settings = load_recipe(run.recipe).dataset.model_copy(update={"eval": {}})
        known = next((each for each in self._known if each[0] == settings), None)
        if known is None:
            text = data.load(settings, progress=self._reporter.progress)
            rows = [(each.source, each.read) for each in text.receipt.sets["train"].sources]
            known = (settings, frozenset(prompt_key(row) for row in text.train), rows)
            self._known.append(known)
        _require_same_rows(run, known[2])
        return known[1]


def changed_since(run: RunFolder | None, held_out: HeldOutSet) -> tuple[str, ...]:
    """A note where a held-out set of the run's own is not what it was: a relative path may be of another file now."""
    then = _rows_then(run, held_out.name) if run else None
    now = list(held_out.read)
    if then is None or then == now or [name for name, _ in then] != [name for name, _ in now]:
        return ()
    return (
        f"The held-out set {held_out.name} has {_rows(now)} rows now and had {_rows(then)} when the run was trained: "
        "its file has changed, or is another of the same name.",
    )


def _require_same_rows(run: RunFolder, rows: list[tuple[str, int]]) -> None:
    """Refuse data with another number of rows than the run has read.

    Raises:
        UserError: how many there were, and are.
    """
    then = _rows_then(run, "train")
    if then is not None and then != rows:
        raise UserError(
            f"the training data of {run.path} has changed since ({_rows(rows)} rows now, {_rows(then)} then)"
        )


def _rows_then(run: RunFolder, name: str) -> list[tuple[str, int]] | None:
    """Sources of a set and the rows that training read from them; None where that was not written down."""
    receipt: Mapping[str, Any] = run.read_manifest().get("receipt") or {}
    recorded = receipt.get("sets", {}).get(name, {}).get("sources")
    return None if recorded is None else [(each["source"], each["read"]) for each in recorded]


def _rows(sources: list[tuple[str, int]]) -> str:
    return f"{sum(count for _, count in sources):,}"
