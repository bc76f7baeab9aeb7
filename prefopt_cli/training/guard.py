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
        row_ids: ids of training rows, given their indices.
    """

    def __init__(self, row_ids: Callable[[list[int]], list[str]]) -> None:
        self._row_ids = row_ids
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._samples: list[Tensor] = []

    def watch(self, losses: Tensor, row_index: Tensor) -> None:
        """Note the per-row losses (B,) of a micro-batch and the indices (B,) of its rows."""
        self._seen.append((losses.detach(), row_index))

    def watch_samples(self, divergences: Tensor) -> None:
        """Note the divergences (K,) of responses that the policy wrote itself."""
        self._samples.append(divergences.detach())

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise `NotFiniteError` naming the step and the rows."""
        seen, self._seen = self._seen, []
        samples, self._samples = self._samples, []
        if not seen or model is None:
            return
        losses = torch.cat([losses for losses, _ in seen])
        divergences = torch.cat([*samples, losses.new_zeros(1)])
        # With fp16 an overflowing gradient is no accident: the loss scaler skips the step and scales down.
        gradient = torch.zeros(()) if args.fp16 else _gradient_norm(model, losses.device)
        of_rows, of_samples = torch.isfinite(losses), torch.isfinite(divergences)
        if bool(of_rows.all() & of_samples.all() & torch.isfinite(gradient).to(losses.device)):
            return
        step = f"step {state.global_step + 1}"
        if of_rows.all() and not of_samples.all():
            raise NotFiniteError(
                f"{step}: the KL to the reference on the policy's own samples is not finite. The step was not taken. "
                "Look at the run's samples.jsonl; a lower training.learning_rate or method.kl_coef often helps."
            )
        also = " and at the samples in samples.jsonl" if samples else ""
        indices = torch.cat([index for _, index in seen])
        what, blamed = ("gradient", indices) if of_rows.all() else ("loss", indices[~of_rows])
        raise NotFiniteError(
            f"{step}: the {what} is not finite. Rows: {', '.join(self._row_ids(blamed.tolist()))}. The step was not "
            f"taken. Look at these rows{also}; a lower training.learning_rate or training.max_grad_norm often helps."
        )


def _gradient_norm(model: nn.Module, device: torch.device) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:  # DeepSpeed keeps them elsewhere, and checks for overflow itself
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(gradients)
    # A sharded gradient gives a sharded norm.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
