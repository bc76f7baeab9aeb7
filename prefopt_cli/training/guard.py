"""Stop before a loss or gradient that is not finite reaches the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
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

    All checks of a step cost one wait for the device, and one number that all processes agree on.

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
        if _all_agree(of_rows.all() & of_samples.all() & torch.isfinite(gradient).to(losses.device)):
            return
        here = _Found(
            names=[name for name, each, _ in seen if not each.isfinite().all()],
            watched=[name for name, _, _ in seen],
            rows=self._ids([index[~each.isfinite()] for _, each, index in seen]),
            all_rows=self._ids([index for _, _, index in seen]),
            samples=not bool(of_samples.all()),
        )
        # A gradient is summed over all processes, of which one may have the rows to look at.
        raise _error(f"step {state.global_step + 1}", gather_object([here]), draws=bool(samples))

    def _ids(self, indices: list[Tensor]) -> list[str]:
        return self._row_ids(list(dict.fromkeys(torch.cat(indices).tolist())))


@dataclass(frozen=True)
class _Found:
    """What one process found."""

    names: list[str]
    """Of the losses that are not finite."""
    watched: list[str]
    rows: list[str]
    """Ids of the rows with one."""
    all_rows: list[str]
    samples: bool
    """Whether a divergence of samples is not finite."""


def _all_agree(finite: Tensor) -> bool:
    """Whether what each process looked at is finite."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        finite = finite.int()
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


def _error(step: str, found: list[_Found], *, draws: bool) -> NotFiniteError:
    """What all processes say, whoever of them is asked."""
    names = list(dict.fromkeys(name for each in found for name in each.names))
    if not names and any(each.samples for each in found):
        return NotFiniteError(
            f"{step}: the KL to the reference on the policy's own samples is not finite. The step was not taken. "
            "Look at the run's samples.jsonl; a lower training.learning_rate or kl_coef often helps."
        )
    failed = names or ["gradient"]
    blamed = dict.fromkeys(row for each in found for row in (each.rows if names else each.all_rows))
    lower = join_names(
        setting
        for name in names or dict.fromkeys(name for each in found for name in each.watched)
        for setting in LOWER[name]
    )
    also = " and at the samples in samples.jsonl" if draws else ""
    return NotFiniteError(
        f"{step}: the {' and the '.join(failed)} {'is' if len(failed) == 1 else 'are'} not finite. Rows: "
        f"{', '.join(blamed)}. The step was not taken. Look at these rows{also}; a lower {lower} often helps."
    )


def _gradient_norm(model: nn.Module, device: torch.device) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:  # DeepSpeed keeps them elsewhere, and checks for overflow itself
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(gradients)
    # A sharded gradient gives a sharded norm.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
