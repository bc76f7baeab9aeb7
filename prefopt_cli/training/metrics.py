"""Means that are exact over uneven batches and several processes.

Every figure is kept as a sum and the count it is over, never as a mean of batch means, and nothing is
moved off the device or between processes until it is logged.
"""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from torch import Tensor


class TrainMeans:
    """Running sums since the last log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, totals: Tensor, counts: Tensor) -> None:
        """Add per-pair totals (B,) and the counts (B,) that they are over."""
        # float32 where float64 is missing (Apple's GPU); sums of one logging window are short.
        wide = torch.float32 if totals.device.type == "mps" else torch.float64
        pair = torch.stack([totals.detach().to(wide).sum(), counts.to(wide).sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def pop(self) -> dict[str, float]:
        """Means over all processes; the sums start again from nothing."""
        state = self.state()
        self._sums = {}
        return {name: total / count for name, (total, count) in state.items() if count}

    def state(self) -> dict[str, list[float]]:
        """Sum and count of every figure over all processes, as plain numbers."""
        if not self._sums:
            return {}
        stacked = torch.stack(list(self._sums.values()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(stacked)
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def load_state(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Take up the sums of a checkpoint (in one process, for all of them)."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {name: torch.tensor(pair, dtype=wide, device=device) for name, pair in state.items()}


class EvalMeans:
    """Per-pair values of one evaluation.

    Several processes see some pairs twice, because their last batches are filled up to equal size. Pairs
    are therefore kept by their index, and each counts once.
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, tuple[float, float]]] = defaultdict(dict)

    def add(self, row_index: Tensor, values: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add totals (B,) and counts (B,) of every metric for the pairs of a batch."""
        indices = row_index.tolist()
        for name, (totals, counts) in values.items():
            for index, total, count in zip(indices, totals.tolist(), counts.tolist(), strict=True):
                self._rows[index][name] = (total, count)

    def pop(self) -> dict[str, float]:
        """Means over all processes, each pair once."""
        gathered: dict[int, dict[str, tuple[float, float]]] = {}
        for rows in gather_object([dict(self._rows)]):
            gathered.update(rows)
        self._rows.clear()
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for index in sorted(gathered):
            for name, (total, count) in gathered[index].items():
                sums[name][0] += total
                sums[name][1] += count
        return {name: total / count for name, (total, count) in sums.items() if count}
