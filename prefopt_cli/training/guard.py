"""Stop before a loss or gradient that is not finite reaches the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefopt_cli.errors import PrefoptError


class NotFiniteError(PrefoptError):
    """A loss or gradient became inf or nan; the weights are still those of the step before."""


class FiniteGuard(TrainerCallback):
    """Looks at the losses and gradients of every optimizer step just before it is taken.

    All checks of a step cost one wait for the device.

    Args:
        pair_ids: ids of training pairs, given their indices.
    """

    def __init__(self, pair_ids: Callable[[list[int]], list[str]]) -> None:
        self._pair_ids = pair_ids
        self._seen: list[tuple[Tensor, Tensor]] = []

    def watch(self, losses: Tensor, pair_index: Tensor) -> None:
        """Note the per-pair losses (B,) of a micro-batch and the indices (B,) of its pairs."""
        self._seen.append((losses.detach(), pair_index))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise `NotFiniteError` naming the step and the pairs."""
        seen, self._seen = self._seen, []
        if not seen or model is None:
            return
        losses = torch.cat([losses for losses, _ in seen])
        # With fp16 an overflowing gradient is no accident: the loss scaler skips the step and scales down.
        gradient = torch.zeros(()) if args.fp16 else _gradient_norm(model, losses.device)
        if bool(torch.isfinite(losses).all() & torch.isfinite(gradient).to(losses.device)):
            return
        indices = torch.cat([index for _, index in seen])
        bad = ~torch.isfinite(losses)
        what, blamed = ("loss", indices[bad]) if bad.any() else ("gradient", indices)
        raise NotFiniteError(
            f"step {state.global_step + 1}: the {what} is not finite. Pairs: "
            f"{', '.join(self._pair_ids(blamed.tolist()))}. The step was not taken. Look at these pairs; a lower "
            "training.learning_rate or training.max_grad_norm, or another method.loss, often helps."
        )


def _gradient_norm(model: nn.Module, device: torch.device) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:  # DeepSpeed keeps them elsewhere, and checks for overflow itself
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(gradients)
    # A sharded gradient gives a sharded norm.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
