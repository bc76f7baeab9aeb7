"""Batches in which responses stand beside degraded versions of themselves."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.batches import ComparisonCollator, example_of

DRAWS = 3
"""Purpose of random numbers: one must not disturb the other (see `samples`)."""

EPOCH_TOLERANCE = 1e-6
"""The library counts epochs as a fraction of steps; a whole one may come out a trifle short."""


class Version(NamedTuple):
    """A response at one level."""

    response: int
    """Which of its row's responses, the best first."""
    level: int
    """0 is the response itself."""
    ids: Any
    """Its tokens; None for the response itself, which is in the batch already."""


def versions_of(row: Mapping[str, Any]) -> list[list[Version]]:
    """All versions of each response that takes part, itself first."""
    found = []
    for number, (levels, ids) in enumerate(zip(row["degraded_levels"], row["degraded_ids"], strict=True)):
        if len(levels):
            degraded = (Version(number, level, version) for level, version in zip(levels, ids, strict=True))
            found.append([Version(number, 0, None), *degraded])
    return found


class DegreeCollator(ComparisonCollator):
    """Rows with degraded responses to one batch of a layout, one prompt and all versions being one segment.

    Training draws levels anew in every epoch: what is drawn for a row follows from the seed, the epoch and the row
    alone, so neither workers nor processes, and no interruption, change it. An evaluation takes all levels.

    Args:
        layout, pad_token_id, pad_to_multiple_of: see `ComparisonCollator`.
        levels_per_step: different levels drawn for each response; None takes all.
        seed: of the draws.
    """

    def __init__(
        self,
        layout: Layout,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        *,
        levels_per_step: int | None,
        seed: int,
    ) -> None:
        super().__init__(layout, pad_token_id, pad_to_multiple_of)
        self._levels_per_step = levels_per_step
        self._seed = seed
        # In shared memory: the workers that load data are other processes.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def of_all_levels(self) -> "DegreeCollator":
        """The same, drawing nothing."""
        return DegreeCollator(
            self.layout, self.pad_token_id, self.multiple, levels_per_step=None, seed=self._seed
        )

    def begin_epoch(self, number: int) -> None:
        """Draw those of this epoch, the first being 0."""
        self._epoch.fill_(number)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of `ComparisonCollator` with D versions besides.

        `degree_rows` (D,) says which of the B rows a version belongs to, `degree_levels` (D,) which level it is, and
        `degree_passages` (D,) its place among the batch's `passages`.
        """
        drawn = [self._draw(row) for row in rows]
        examples = [
            replace(example_of(row), unscored=[each.ids for each in versions if each.ids is not None])
            for row, versions in zip(rows, drawn, strict=True)
        ]
        batch = self.batch(rows, examples)
        unscored = iter(range(batch["slots"].size(0), batch["passages"].size(0)))
        versions = [(index, each) for index, own in enumerate(drawn) for each in own]
        places = [
            int(batch["responses"][index, each.response]) if each.ids is None else next(unscored)
            for index, each in versions
        ]
        return {
            **batch,
            "degree_rows": torch.tensor([index for index, _ in versions], dtype=torch.int64),
            "degree_levels": torch.tensor([each.level for _, each in versions], dtype=torch.int64),
            "degree_passages": torch.tensor(places, dtype=torch.int64),
        }

    def _draw(self, row: Mapping[str, Any]) -> list[Version]:
        """Versions of the row's responses, in their order."""
        versions = versions_of(row)
        if self._levels_per_step is None:
            return [each for own in versions for each in own]
        random = np.random.default_rng([self._seed, DRAWS, int(self._epoch), row["row_index"]])
        drawn = []
        for own in versions:
            count = min(self._levels_per_step, len(own))
            drawn += [own[place] for place in sorted(random.choice(len(own), count, replace=False))]
        return drawn


class EpochCount(TrainerCallback):
    """Tells the collator of every epoch."""

    def __init__(self, collator: DegreeCollator) -> None:
        self._collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run begins within an epoch."""
        self._collator.begin_epoch(int((state.epoch or 0.0) + EPOCH_TOLERANCE))
