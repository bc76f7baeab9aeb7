"""What the functions of the head share: logits of a few tokens at a time, and the gradients that add up over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def slices(count: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that together are ``range(count)``."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@dataclass(frozen=True)
class Numerics:
    """How logits are computed."""

    dtype: torch.dtype
    """Type of the products of hidden states and head; what comes after them runs in `wide`."""
    scale: float
    """Factor of the logits."""
    softcap: float | None
    """Logits are squeezed to c tanh(logits / c), or not where it is None."""

    @classmethod
    def here(cls, hidden: Tensor, scale: float, softcap: float | None) -> "Numerics":
        """With products in autocast's type where it is on, else in that of the hidden states."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return cls(dtype, scale, softcap)

    @property
    def wide(self) -> torch.dtype:
        """float32 or wider."""
        return torch.promote_types(self.dtype, torch.float32)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(n, V) transformed logits of hidden (n, H), weight (V, H), bias (V,), wide, in memory of their own."""
        logits = hidden.to(self.dtype) @ weight.to(self.dtype).t()
        if bias is not None:
            logits += bias.to(self.dtype)
        logits = logits.to(self.wide)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap, by the (n, V) logits that come out of it; None where there is none."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()


class HeadGradients:
    """Gradients of hidden states (N, H), weight (V, H) and bias (V,), added up chunk by chunk."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor, needed: Sequence[bool]
    ) -> None:
        """``head`` is the weight in the type of the products; ``needed`` says which of the three are wanted."""
        self._inputs = hidden, weight, bias
        self._head = head
        wide = torch.promote_types(head.dtype, torch.float32)
        self._sums = [
            torch.zeros_like(tensor, dtype=wide) if tensor is not None and wanted else None
            for tensor, wanted in zip(self._inputs, needed, strict=True)
        ]

    def add(self, rows: slice, by_logits: Tensor) -> None:
        """Add what a chunk contributes: (n, V) gradient with respect to the products of hidden and weight."""
        for_hidden, for_weight, for_bias = self._sums
        if for_bias is not None:
            for_bias += by_logits.sum(0)
        products = by_logits.to(self._head.dtype)
        if for_hidden is not None:
            for_hidden[rows] = products @ self._head
        if for_weight is not None:
            hidden = self._inputs[0][rows].to(for_weight.dtype)
            for_weight.addmm_(products.t().to(for_weight.dtype), hidden)

    def totals(self) -> list[Tensor | None]:
        """The three gradients in the types of their tensors; None where it was not wanted."""
        return [
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(self._sums, self._inputs, strict=True)
        ]
