"""The trainer of Sequential Preference Optimization."""

from typing import Any

import torch
from torch import Tensor, nn

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, ConvexFunction, log_ratio_margin, slope
from prefopt_cli.losses.sequential import weighted
from prefopt_cli.models.ancestry import Ancestry
from prefopt_cli.recipe.schema import SequentialSettings
from prefopt_cli.training.batches import PREVIOUS_MARGINS, Lists
from prefopt_cli.training.row_metrics import reward_metrics
from prefopt_cli.training.trainer import PreferenceTrainer


class SequentialTrainer(PreferenceTrainer):
    """Minimises E[f(beta * rho - sum_i lambda_i dR_i)], one stage after others (Lou et al., AAAI 2025).

    rho is the log-ratio margin to the reference, the policy that the last stage ended with. dR_i, the implicit reward
    margins of the earlier stages, do not change while this one trains: the datasets have them as `PREVIOUS_MARGINS`,
    so no earlier policy is asked or held.

    Args:
        settings: the alignment loss's section of the recipe.
        ancestry: the earlier stages.
        function: f, where `settings.loss` is not the name of one of the paper's.
        **arguments: see `PreferenceTrainer`.
    """

    def __init__(
        self,
        *,
        settings: SequentialSettings,
        ancestry: Ancestry,
        function: ConvexFunction | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.settings = settings
        self.dimensions = ancestry.dimensions
        self.lambdas = ancestry.lambdas
        self.function = function or CONVEX_FUNCTIONS[settings.loss]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean of f(beta * rho - sum_i lambda_i dR_i) over the pairs of a batch."""
        beta = self.settings.beta
        scores, ref_chosen, ref_rejected = self.score_pairs(model, inputs)
        chosen, rejected = scores.logps.chunk(2)
        lengths = scores.lengths.chunk(2) if self.settings.length_normalize else (None, None)
        margins = inputs[PREVIOUS_MARGINS].unbind(1)
        rho = log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected, *lengths)
        argument = beta * rho - weighted(margins, self.lambdas)
        losses = self.function(argument)
        with torch.no_grad():
            ones = torch.ones_like(rho)
            metrics = {
                **reward_metrics(
                    beta * torch.stack((chosen - ref_chosen, rejected - ref_rejected), 1), Lists.of(inputs)
                ),
                "sequential/gradient_weight": (slope(self.function, argument).abs(), ones),
                **{
                    f"sequential/previous_margin_{name}": (margin, ones)
                    for name, margin in zip(self.dimensions, margins, strict=True)
                },
            }
        loss = self.finish_loss(losses, scores, inputs, metrics)
        return (loss, {}) if return_outputs else loss
