"""Stop before a loss or gradient that is not finite reaches the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefopt_cli.errors import PrefoptError
from prefopt_cli.recipe.problems import join_names

LOWER = {
    "loss": ("training.learning_rate", "training.max_grad_norm"),
    "degree loss": ("method.head_learning_rate", "method.ssl_coef"),
}
"""The losses by name, each with the settings that often help where it is not finite."""


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
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._samples: list[Tensor] = []

    def watch(self, losses: Tensor, row_index: Tensor, what: str = "loss") -> None:
        """Note the per-row losses (B,) of a micro-batch and the indices (B,) of its rows; `what` is one of `LOWER`."""
        self._seen.append((what, losses.detach(), row_index))

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
        """Raise `NotFiniteError` naming the step, the losses and the rows."""
        seen, self._seen = self._seen, []
        samples, self._samples = self._samples, []
        if not seen or model is None:
            return
        losses = torch.cat([losses for _, losses, _ in seen])
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
                "Look at the run's samples.jsonl; a lower training.learning_rate or kl_coef often helps."
            )
        also = " and at the samples in samples.jsonl" if samples else ""
        indices = torch.cat([index for _, _, index in seen])
        names = dict.fromkeys(name for name, each, _ in seen if of_rows.all() or not each.isfinite().all())
        failed, blamed = (["gradient"], indices) if of_rows.all() else (list(names), indices[~of_rows])
        rows = ", ".join(self._row_ids(list(dict.fromkeys(blamed.tolist()))))
        lower = join_names(setting for name in names for setting in LOWER[name])
        raise NotFiniteError(
            f"{step}: the {' and the '.join(failed)} {'is' if len(failed) == 1 else 'are'} not finite. Rows: {rows}. "
            f"The step was not taken. Look at these rows{also}; a lower {lower} often helps."
        )


def _gradient_norm(model: nn.Module, device: torch.device) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:  # DeepSpeed keeps them elsewhere, and checks for overflow itself
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(gradients)
    # A sharded gradient gives a sharded norm.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
