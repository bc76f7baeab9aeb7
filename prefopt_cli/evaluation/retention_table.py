"""The table of what each stage of a chain did to each dimension: cells, changes, files."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_cli.errors import PrefoptError
from prefopt_cli.evaluation.heat_map import Panel, heat_map
from prefopt_cli.evaluation.statistics import LEVEL, Estimate, means_with_intervals
from prefopt_cli.runs import atomic

BASE = "base"


@dataclass(frozen=True)
class Stage:
    """A policy of the chain."""

    name: str
    """Its dimension, with its number where others are called so too; `BASE` for the base."""
    dimension: str | None = None
    """What it was trained for; None for the base."""
    run: str | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Cell:
    """One policy on one held-out set, each figure with its interval. rho is its log-ratio margin to the base."""

    accuracy: Estimate
    """Share of pairs with rho > 0, ties counting one half."""
    margin: Estimate
    """Mean rho, in nats."""
    logp_accuracy: Estimate
    """Share of pairs whose chosen response has the higher log-probability."""


@dataclass(frozen=True)
class Change:
    """What became of a dimension after the stage that trained it, pair by pair: below zero, it was forgotten."""

    since: str
    until: str
    """The last stage."""
    accuracy: Estimate
    margin: Estimate
    """In nats."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out set."""

    pairs: int
    prompts: int
    data: str
    """sha256 of its tokens."""


@dataclass(frozen=True)
class Retention:
    """The table of stages and dimensions."""

    chain: tuple[Stage, ...]
    """The base first, then the stages in order."""
    held_out: dict[str, HeldOut]
    cells: dict[tuple[str, str], Cell]
    """By the names of stage and set."""
    changes: dict[str, Change]
    """By dimension, where a set is named after it and it was not trained last."""
    computed: int
    """Log-probabilities that were not in the cache."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Their names, the base first."""
        return tuple(stage.name for stage in self.chain)

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the held-out sets."""
        return tuple(self.held_out)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "level": LEVEL,
            "sets": {name: asdict(found) for name, found in self.held_out.items()},
            "stages": [
                {
                    **asdict(stage),
                    "results": {name: _figures(self.cells[stage.name, name]) for name in self.sets},
                }
                for stage in self.chain
            ],
            "forgetting": {
                name: {"since": change.since, "until": change.until, **_figures(change)}
                for name, change in self.changes.items()
            },
            "computed": self.computed,
        }

    def write(self, folder: Path) -> None:
        """Write `retention.json`, `retention.csv` and `retention.png`, each atomically.

        Raises:
            PrefoptError: the folder cannot be written.
        """
        drawn = self._drawn()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(folder / "retention.json", self.to_dict())
            atomic.write_text(folder / "retention.csv", self._csv())
            with atomic.file(folder / "retention.png") as file:
                file.write(drawn)
        except OSError as error:
            raise PrefoptError(
                f"The retention table cannot be written to {folder}: {error.strerror}."
            ) from error

    def _csv(self) -> str:
        """Long form: a line per figure. Changes stand with the last stage, their measure named after them."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["stage", "dimension", "measure", "value", "low", "high", "pairs"])
        rows: list[tuple[str, str, str, Cell | Change]] = [
            (stage, name, "", self.cells[stage, name]) for stage in self.stages for name in self.sets
        ]
        rows += [
            (each.until, name, f"_change_since_{each.since}", each) for name, each in self.changes.items()
        ]
        for stage, name, ending, figures in rows:
            for measure, estimate in _figures(figures).items():
                shown = (f"{value:.8g}" for value in estimate.values())
                lines.writerow([stage, name, measure + ending, *shown, self.held_out[name].pairs])
        return text.getvalue()

    def _drawn(self) -> bytes:
        trained = {
            (row, name) for row, each in enumerate(self.chain) for name in self.sets if each.dimension == name
        }
        marked = {(row, self.sets.index(name)) for row, name in trained}
        panels = [
            Panel(
                title,
                [[getattr(self.cells[stage, name], measure) for name in self.sets] for stage in self.stages],
            )
            for title, measure in (("accuracy", "accuracy"), ("margin, nats", "margin"))
        ]
        return heat_map(panels, self.stages, self.sets, centres=(0.5, 0.0), marked=marked)


def table(
    chain: Sequence[Stage], deltas: Mapping[str, Sequence[np.ndarray]], prompts: Mapping[str, Sequence[Any]]
) -> tuple[dict[tuple[str, str], Cell], dict[str, Change]]:
    """Cells and changes.

    Args:
        chain: the base and the stages.
        deltas: by set, for every policy of the chain (N,) logp(chosen) - logp(rejected), in nats.
        prompts: by set, (N,) the prompt of each pair; pairs of one prompt are resampled together.
    """
    cells: dict[tuple[str, str], Cell] = {}
    changes: dict[str, Change] = {}
    for name, of_policies in deltas.items():
        rhos = [delta - of_policies[0] for delta in of_policies]
        trained = [number for number, stage in enumerate(chain) if stage.dimension == name]
        since = trained[-1] if trained and trained[-1] < len(chain) - 1 else None
        quantities = {}
        for number, (rho, delta) in enumerate(zip(rhos, of_policies, strict=True)):
            quantities[f"accuracy {number}"] = _won(rho)
            quantities[f"margin {number}"] = rho
            quantities[f"logp_accuracy {number}"] = _won(delta)
        if since is not None:
            quantities["accuracy"] = _won(rhos[-1]) - _won(rhos[since])
            quantities["margin"] = rhos[-1] - rhos[since]
        found = means_with_intervals(quantities, prompts[name])
        for number, stage in enumerate(chain):
            cells[stage.name, name] = Cell(
                *(found[f"{measure} {number}"] for measure in ("accuracy", "margin", "logp_accuracy"))
            )
        if since is not None:
            changes[name] = Change(chain[since].name, chain[-1].name, found["accuracy"], found["margin"])
    return cells, changes


def _won(margins: np.ndarray) -> np.ndarray:
    """(N,) 1 above zero, 0 below, one half at zero."""
    won: np.ndarray = (np.sign(margins) + 1) / 2
    return won


def _figures(found: Cell | Change) -> dict[str, dict[str, float]]:
    return {name: value.to_dict() for name, value in vars(found).items() if isinstance(value, Estimate)}
