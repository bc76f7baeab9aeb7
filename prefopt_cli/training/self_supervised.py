"""The trainer of Self-supervised Preference Optimization."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trl import DPOConfig

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import SelfSupervisedSettings
from prefopt_cli.scoring.forward import ResponseScores, plain_model, score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.degree_batches import DegreeCollator, EpochCount
from prefopt_cli.training.head_optimizer import HeadOptimizer
from prefopt_cli.training.last_batch import mean_over_rows
from prefopt_cli.training.row_metrics import RowMetrics
from prefopt_cli.training.trainer import PreferenceTrainer

HEAD_STEP = 1.0
"""Default learning rate of the head, times the hidden size: a step of Adam then moves a logit by about a typical entry
of the state, however wide the state. Three times as much was stable too, and quicker, in runs of some eighty steps."""


class SelfSupervisedTrainer(PreferenceTrainer):
    """Minimises L_align + ssl_coef L_degree (Li et al., EMNLP 2024 Findings, arXiv 2409.17791).

    L_degree is the cross-entropy of a linear classifier that is shown a response, or a version of it without some of
    its key phrases, by its last hidden state, and tells the level. Of a row it is the mean over its versions in the
    batch, 0 where none takes part; of a batch the mean over its rows. The classifier begins with zeros: at first it
    tells nothing, and the policy is not pushed about.

    A class of its own stands in front of the trainer of the alignment loss, which stays as it is: see `beside`. An
    evaluation reports the alignment loss, and how well all levels are told.

    Args:
        degrees: the recipe's method section.
        **arguments: those of the alignment loss's trainer. The datasets have `degraded_ids`, `degraded_levels` too.

    Raises:
        ValueError: the model's experts are balanced by a loss, for which it has to run in a way that shows no states.
    """

    def __init__(self, *, degrees: SelfSupervisedSettings, **arguments: Any) -> None:
        self.degrees = degrees
        self.data_collator: DegreeCollator
        self._states: Tensor | None = None
        super().__init__(**arguments)
        if self.aux_loss_enabled:
            raise ValueError(
                "A model whose experts are balanced by a loss runs in a way that shows no states."
            )
        if self.is_deepspeed_enabled and self.args.fp16:
            raise UserError(
                "method self_supervised: DeepSpeed scales the loss of training.fp16 in its own way, which its "
                "classifier would not learn of. Use training.bf16, or launch.engine: fsdp."
            )
        size = plain_model(self.model).get_output_embeddings().weight.size(1)
        # Not drawn and then overwritten: what is drawn here would be missing elsewhere, in dropout for one.
        self.degree_head = nn.utils.skip_init(
            nn.Linear, size, degrees.levels, device=self.args.device, dtype=torch.float32
        )
        nn.init.zeros_(self.degree_head.weight)
        nn.init.zeros_(self.degree_head.bias)
        self.add_callback(EpochCount(self.data_collator))
        rate = degrees.head_learning_rate or HEAD_STEP / self.degree_head.in_features
        self.head_optimizer = HeadOptimizer(self, self.degree_head, rate)
        self.add_callback(self.head_optimizer)

    @classmethod
    def beside(cls, alignment: type[PreferenceTrainer]) -> type["SelfSupervisedTrainer"]:
        """The trainer of this loss beside that of an alignment loss."""
        return type(f"SelfSupervised{alignment.__name__}", (cls, alignment), {})

    def make_collator(self, padding_id: int, args: DPOConfig) -> DegreeCollator:
        """One that draws levels."""
        return DegreeCollator(
            Layout(),
            padding_id,
            args.pad_to_multiple_of,
            levels_per_step=self.degrees.levels_per_step,
            seed=args.seed,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of all levels: an evaluation is the same whatever the draws."""
        training, self.data_collator = self.data_collator, self.data_collator.of_all_levels()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def score_policy(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> ResponseScores:
        """Scores of the K responses under the policy; the states of all versions are kept for the degree loss."""
        scores = score_responses(model, inputs, self.layout, pooling=self.degrees.pooling)
        self._states = scores.states
        return scores

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The alignment loss of a batch, in training plus the weighted degree loss from the same forward pass."""
        loss = super().compute_loss(model, inputs)
        states, self._states = self._states, None
        if states is None:
            raise RuntimeError(f"{type(self).__name__} did not score the policy.")
        losses = self._degree_losses(states, inputs)
        if self.model.training:
            self.guard.watch(losses, inputs["row_index"], what="degree loss")
            loss = loss + self.degrees.ssl_coef * mean_over_rows(losses, inputs)
        return (loss, {}) if return_outputs else loss

    def _degree_losses(self, states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B,) losses of the rows, from the states (P, H) of all responses, after noting how the levels were told."""
        rows, levels = inputs["degree_rows"], inputs["degree_levels"]
        states = states.index_select(0, inputs["degree_passages"])
        with torch.autocast(states.device.type, enabled=False):
            logits = self.degree_head(states.float())
            each = cross_entropy(logits, levels, reduction="none")
        numbers = torch.arange(len(inputs["row_index"]), device=rows.device)
        belongs = (rows == numbers[:, None]).to(each.dtype)

        def by_row(values: Tensor) -> Tensor:
            """(B,) sums of values (D,); in no product, as autocast would round it, nor by index, for CUDA's order."""
            return (belongs * values).sum(1)

        counts = by_row(torch.ones_like(each))
        losses = by_row(each) / counts.clamp(min=1)
        with torch.no_grad():
            right = (logits.argmax(1) == levels).to(each.dtype)
            metrics: RowMetrics = {
                "ssl/loss": (losses, (counts > 0).to(each.dtype)),
                "ssl/accuracy": (by_row(right), counts),
            }
            for level in range(self.degrees.levels):
                own = (levels == level).to(each.dtype)
                metrics[f"ssl/accuracy_level_{level}"] = (by_row(right * own), by_row(own))
            if self.model.training:
                metrics["ssl/term"] = (losses, torch.ones_like(losses))
        self.note_rows(metrics, inputs)
        return losses

    def complete_means(self, means: dict[str, float]) -> None:
        """The objective, with the degree loss that belongs to it; rows without degrees have none."""
        super().complete_means(means)
        means["align/loss"] = means["loss"]
        means["loss"] += self.degrees.ssl_coef * means.pop("ssl/term")

    def progress_state(self, folder: Path) -> dict[str, Any]:
        """With the head, in a file of its own."""
        if self.is_world_process_zero():
            self.head_optimizer.save(folder)
        return super().progress_state(folder)

    def load_progress_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """Every process takes up the head."""
        super().load_progress_state(state, folder)
        self.head_optimizer.load(folder)
