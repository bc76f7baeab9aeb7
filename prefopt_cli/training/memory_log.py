"""Which tensors are alive when: a log of every allocation of a block of torch code.

Storages are followed, not tensors, so that views and in-place results cost nothing. With fake tensors the
log costs no memory and tells what the same code would allocate.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Timeline:
    """How many bytes of each part were alive, moment by moment."""

    parts: tuple[str, ...]
    sizes: np.ndarray
    """(M, P) bytes of the P parts at those M moments at which a peak may be: before something is freed."""

    def peak(self, shares: Mapping[str, float] | None = None) -> dict[str, int]:
        """Bytes by part at the moment when most bytes are alive; parts of which none are alive then are left out.

        Args:
            shares: of some parts, how much of them this process has, where others have the rest. With smaller
                gradients, the peak may be at another moment.
        """
        if not len(self.sizes):
            return {}
        scaled = self.sizes * np.array([(shares or {}).get(part, 1.0) for part in self.parts])
        highest = scaled[scaled.sum(1).argmax()]
        return {
            part: round(size) for part, size in zip(self.parts, highest.tolist(), strict=True) if round(size)
        }


class AllocationLog(TorchDispatchMode):
    """Context manager that records birth and death of every storage that an operator returns.

    A storage belongs to the part that `part` names when it is born, with two exceptions that only the
    operator can tell: casts of parameters are "low-precision weight copies", and what is born while a
    backward pass records a graph is "recomputed activations" (gradient checkpointing).
    """

    CAST = "low-precision weight copies"
    RECOMPUTED = "recomputed activations"

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.in_backward = False
        self._parts: list[str] = []  # by serial number of the storage
        self._weights: set[int] = set()  # serial numbers
        self._events: list[tuple[int, int]] = []  # (serial number, bytes gained or lost)
        self._living: dict[int, tuple[int, weakref.ref]] = {}

    def own(self, tensors: Iterable[Tensor], part: str) -> None:
        """Enter parameters or buffers that exist before the block runs."""
        for tensor in tensors:
            serial = self._enter(tensor, part)
            if serial is not None:
                self._weights.add(serial)

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say afterwards to which part living tensors belong (gradients are known only at the end)."""
        for tensor in tensors:
            known = self._living.get(id(tensor.untyped_storage()))
            if known is not None:
                self._parts[known[0]] = part

    def peak(self) -> dict[str, int]:
        """Bytes by part at the moment when most bytes were alive."""
        return self.timeline().peak()

    def timeline(self) -> Timeline:
        """What was alive when."""
        parts = tuple(dict.fromkeys(self._parts))
        column = {part: number for number, part in enumerate(parts)}
        changes = np.zeros((len(self._events), len(parts)), dtype=np.int64)
        for row, (serial, change) in zip(changes, self._events, strict=True):
            row[column[self._parts[serial]]] = change
        gained = changes.sum(1) > 0
        before_a_loss = gained & ~np.append(gained[1:], False)
        return Timeline(parts, changes.cumsum(0)[before_a_loss])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        part = self._part_of(func, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf, part)
        return result

    def _part_of(self, func: Any, args: Any) -> str:
        if func is torch.ops.aten._to_copy.default:
            known = self._living.get(id(args[0].untyped_storage()))
            if known is not None and known[0] in self._weights:
                return self.CAST
        # Autograd switches recording off while it runs backward; checkpointing switches it on to recompute.
        return self.RECOMPUTED if self.in_backward and torch.is_grad_enabled() else self.part

    def _enter(self, tensor: Tensor, part: str) -> int | None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._living:
            return None
        serial = len(self._parts)

        def leave(_: Any) -> None:
            del self._living[key]
            self._events.append((serial, -size))

        self._parts.append(part)
        self._events.append((serial, size))
        self._living[key] = (serial, weakref.ref(storage, leave))
        return serial
