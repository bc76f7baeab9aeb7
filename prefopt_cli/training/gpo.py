"""The trainer of Generalized Preference Optimization."""

from typing import Any

import torch
from torch import Tensor, nn

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, ConvexFunction, gpo_loss, log_ratio_margin, slope
from prefopt_cli.recipe.schema import GPOSettings
from prefopt_cli.training.batches import Lists
from prefopt_cli.training.row_metrics import reward_metrics
from prefopt_cli.training.trainer import PreferenceTrainer


class GPOTrainer(PreferenceTrainer):
    """Minimises E[f(beta * rho)] (Tang et al., ICML 2024, arXiv 2402.05749, eq. 4).

    Args:
        settings: the recipe's method section.
        function: f, where `settings.loss` is not the name of one of the paper's.
        **arguments: see `PreferenceTrainer`.
    """

    def __init__(
        self, *, settings: GPOSettings, function: ConvexFunction | None = None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.settings = settings
        self.function = function or CONVEX_FUNCTIONS[settings.loss]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean of f(beta * rho) over the pairs of a batch."""
        beta = self.settings.beta
        scores, ref_chosen, ref_rejected = self.score_pairs(model, inputs)
        chosen, rejected = scores.logps.chunk(2)
        lengths = scores.lengths.chunk(2) if self.settings.length_normalize else (None, None)
        losses = gpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            loss=self.function,
            beta=beta,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
        )
        with torch.no_grad():
            rho = log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected, *lengths)
            ones = torch.ones_like(rho)
            metrics = {
                **reward_metrics(
                    beta * torch.stack((chosen - ref_chosen, rejected - ref_rejected), 1), Lists.of(inputs)
                ),
                "gpo/gradient_weight": (slope(self.function, beta * rho).abs(), ones),
                "gpo/squared_log_ratio": (rho.square(), ones),
            }
        loss = self.finish_loss(losses, scores, inputs, metrics)
        return (loss, {}) if return_outputs else loss
