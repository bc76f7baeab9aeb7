"""Does a recipe fit a budget of memory, and with which settings would it?"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.training.extent import row_lengths
from prefopt_cli.training.memory_engines import processes_of
from prefopt_cli.training.memory_estimate import MemoryEstimate
from prefopt_cli.training.memory_recipe import RecipeMemory
from prefopt_cli.training.memory_settings import (
    BATCH,
    Batches,
    Rung,
    Setting,
    batch_settings,
    evaluation_settings,
    rungs,
    share_out,
)
from prefopt_cli.training.preparation import training_field

MARGIN = 0.08
"""Share of the budget that is left free: the estimate may err, and a device keeps some of its memory to itself."""

LARGEST = 1024
"""Rows of a micro-batch beyond which nobody asks."""


@dataclass(frozen=True)
class Budget:
    """What there is, and how to change the recipe."""

    memory: int
    """Bytes for each process."""
    change: Callable[[Sequence[str]], Recipe]
    """The recipe with more overrides; it raises `UserError` where they make no recipe."""
    gpus: int | None = None
    """On all machines together; None: as many as the recipe has processes."""

    @property
    def usable(self) -> int:
        """Bytes that an estimate may reach."""
        return int(self.memory * (1 - MARGIN))


@dataclass(frozen=True)
class Proposal:
    """Settings to append to the command line, and what the run would take with them."""

    settings: list[Setting]
    estimate: MemoryEstimate

    @property
    def overrides(self) -> list[str]:
        """As they are appended."""
        return [setting.override for setting in self.settings]

    @property
    def keeps_result(self) -> bool:
        """Whether the same thing is trained, up to rounding."""
        return all(setting.keeps_result for setting in self.settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "overrides": self.overrides,
            "keeps_result": self.keeps_result,
            "settings": [vars(setting) for setting in self.settings],
            "memory": self.estimate.to_dict(),
        }


@dataclass(frozen=True)
class Fit:
    """The answer."""

    memory: int
    """The budget, in bytes for each process."""
    usable: int
    """Of it, what an estimate may reach."""
    gpus: int
    as_it_is: bool
    """Whether the recipe fits unchanged."""
    largest_batch: int | None
    """Where it does, the largest of per_device_train_batch_size times 1, 2, 4, ... that fits, too."""
    proposal: Proposal | None
    """The first settings that fit; None where the recipe does as it is, or nothing does."""
    smallest: Proposal | None
    """Where nothing fits, the settings that take the least."""
    seconds: float
    """What it took to find out."""
    estimates: int
    """How many different steps were traced for it."""

    @property
    def missing(self) -> int:
        """Bytes by which the smallest settings miss."""
        return self.smallest.estimate.needed - self.usable if self.smallest else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        proposals = {
            name: found.to_dict() if found else None
            for name, found in (("proposal", self.proposal), ("smallest", self.smallest))
        }
        return {**vars(self), **proposals, "missing": self.missing}


def fit(recipe: Recipe, memory: RecipeMemory, budget: Budget) -> Fit:
    """Look for the first settings that fit, in the order of `memory_settings.rungs`.

    Args:
        recipe: as it is.
        memory: estimates it.
        budget: to be met.

    Raises:
        UserError: there are fewer GPUs than machines.
    """
    start, traced = time.perf_counter(), memory.traced
    processes = processes_of(recipe, budget.gpus)
    gpus = budget.gpus or processes
    if gpus < recipe.launch.machines:
        raise UserError(
            f"--gpus: expected at least one for each of launch.machines ({recipe.launch.machines}), found {gpus}."
        )
    as_it_is = processes <= gpus and memory.estimate(recipe).needed <= budget.usable
    largest = _largest_batch(recipe, memory, budget) if as_it_is else None
    search = _Search(recipe, memory, budget, processes, share_out(recipe, processes, gpus))
    proposal = None if as_it_is else search.first()
    return Fit(
        memory=budget.memory,
        usable=budget.usable,
        gpus=gpus,
        as_it_is=as_it_is,
        largest_batch=largest,
        proposal=proposal,
        smallest=None if as_it_is or proposal else search.smallest,
        seconds=time.perf_counter() - start,
        estimates=memory.traced - traced,
    )


def _largest_batch(recipe: Recipe, memory: RecipeMemory, budget: Budget) -> int:
    size = training_field(recipe.training, "per_device_train_batch_size")
    most = min(len(row_lengths(memory.prepared.tokens.train)), LARGEST)
    while 2 * size <= most:
        if memory.estimate(budget.change([f"{BATCH}={2 * size}"])).needed > budget.usable:
            break
        size *= 2
    return int(size)


class _Search:
    """Goes down the rungs; on each, the largest micro-batch that fits is taken."""

    def __init__(
        self, recipe: Recipe, memory: RecipeMemory, budget: Budget, processes: int, batches: Batches
    ) -> None:
        self._recipe, self._memory, self._budget = recipe, memory, budget
        self._processes, self._batches = processes, batches
        self.smallest: Proposal | None = None

    def first(self) -> Proposal | None:
        """The first settings that fit."""
        return next(filter(None, map(self._on, self._rungs())), None)

    def _rungs(self) -> Iterator[Rung]:
        return rungs(
            self._recipe,
            processes=self._batches.processes,
            on_gpu=self._memory.device != "cpu",
            reference_on_data=self._memory.objective.reference == "data",
            base=self._memory.base(self._recipe),
        )

    def _on(self, rung: Rung) -> Proposal | None:
        """The largest micro-batch that fits with these settings; its memory grows with it.

        With one exception, and so the largest comes first: where a step is a single micro-batch, no gradients are
        collected.
        """
        sizes = self._batches.micro_batches()
        if rung.accumulates:  # it would change nothing where a step is one micro-batch
            sizes = [size for size in sizes if size < self._batches.rows]
        if not sizes:
            return None
        found = self._fitting(rung, sizes[0])
        if found or len(sizes) == 1:
            return found
        found = self._fitting(rung, sizes[-1])
        low, high = 1, len(sizes) - 1  # it fits at `high`, and at none before `low`
        while found and low < high:
            middle = (low + high) // 2
            larger = self._fitting(rung, sizes[middle])
            found, low, high = (larger, low, middle) if larger else (found, middle + 1, high)
        return found

    def _fitting(self, rung: Rung, micro: int) -> Proposal | None:
        settings = [*batch_settings(self._recipe, self._batches, self._processes, micro), *rung.settings]
        try:
            proposal = self._with(settings)
            if proposal.estimate.phase == "evaluation" and proposal.estimate.needed > self._budget.usable:
                proposal = self._with([*settings, *evaluation_settings(self._recipe, micro)])
        except UserError:  # the recipe has something that does not go with these settings
            return None
        if self.smallest is None or proposal.estimate.needed < self.smallest.estimate.needed:
            self.smallest = proposal
        return proposal if proposal.estimate.needed <= self._budget.usable else None

    def _with(self, settings: list[Setting]) -> Proposal:
        changed = self._budget.change([setting.override for setting in settings])
        return Proposal(settings, self._memory.estimate(changed))
