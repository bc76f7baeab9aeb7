"""The optimizer of the degree classifier, which is no part of the model: engines that shard know only the model's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from prefopt_cli.training.trainer import PreferenceTrainer

HEAD_FILE = "degree_head.safetensors"
"""The classifier in a checkpoint, with the states of its optimizer."""

WEIGHTS, STATES = "head.", "optimizer."
"""What the names of its tensors begin with."""


class HeadOptimizer(TrainerCallback):
    """Steps the classifier whenever the policy is stepped: by the recipe's `optim` and on its schedule.

    Its gradients are averaged over the processes, as those of the policy are, but not clipped.

    Args:
        trainer: of the policy.
        head: the classifier, the same in every process.
        learning_rate: where the policy's is `learning_rate` of the recipe; both follow one schedule.
    """

    def __init__(self, trainer: "PreferenceTrainer", head: nn.Linear, learning_rate: float) -> None:
        self._trainer, self._head, self._rate = trainer, head, learning_rate
        kind, options = _kind(trainer.args)
        groups = [
            {"params": [head.weight], "weight_decay": trainer.args.weight_decay},
            {"params": [head.bias], "weight_decay": 0.0},
        ]
        self._optimizer: torch.optim.Optimizer = kind(groups, **{**options, "lr": learning_rate})
        if hasattr(self._optimizer, "train"):
            self._optimizer.train()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the gradients, and undo the scaling of fp16."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        scaler = self._trainer.accelerator.scaler
        for parameter in self._head.parameters():
            if parameter.grad is None:
                continue
            if several:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
            if scaler is not None:
                parameter.grad /= scaler.get_scale()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step, unless half precision has overflown somewhere: the policy takes none then either."""
        gradients = [parameter.grad for parameter in self._head.parameters() if parameter.grad is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        if gradients and finite and not self._trainer.accelerator.optimizer_step_was_skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate
            self._optimizer.step()
        self._head.zero_grad()

    @property
    def learning_rate(self) -> float:
        """That of this step."""
        return self._rate * self._schedule()

    def _schedule(self) -> float:
        """The policy's learning rate of this step, as a share of the recipe's, which may be 0."""
        scheduler: Any = self._trainer.lr_scheduler
        if hasattr(scheduler, "lr_lambdas"):
            return float(scheduler.lr_lambdas[0](scheduler.last_epoch))
        whole: float = self._trainer.args.learning_rate
        now: float = self._trainer.optimizer.param_groups[0]["lr"]
        return now / whole if whole else 1.0

    def save(self, folder: Path) -> None:
        """Write classifier and states into a checkpoint."""
        tensors = {f"{WEIGHTS}{name}": value for name, value in self._head.state_dict().items()}
        plain: dict[str, Any] = {}
        for number, states in self._optimizer.state_dict()["state"].items():
            for name, value in states.items():
                key = f"{STATES}{number}.{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    plain[key] = value
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, folder / HEAD_FILE, metadata={"plain": json.dumps(plain)})

    def load(self, folder: Path) -> None:
        """Take both up from a checkpoint."""
        tensors: dict[str, Any] = dict(load_file(folder / HEAD_FILE))
        with safe_open(folder / HEAD_FILE, "pt") as file:
            tensors.update(json.loads((file.metadata() or {}).get("plain", "{}")))
        self._head.load_state_dict(saved_head(folder))
        states: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith(STATES):
                number, name = key.removeprefix(STATES).split(".", 1)
                states.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": states})


def saved_head(folder: Path) -> dict[str, Tensor]:
    """weight (M, H) and bias (M,) of the classifier of a checkpoint."""
    saved: dict[str, Tensor] = load_file(folder / HEAD_FILE)
    return {name.removeprefix(WEIGHTS): value for name, value in saved.items() if name.startswith(WEIGHTS)}


def _kind(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """The recipe's optimizer; AdamW where it is one that wants to see a whole model."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError:
        return torch.optim.AdamW, {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return kind, {
        name: value for name, value in options.items() if name not in ("params", "model", "optimizer_dict")
    }
