"""TRL's metrics of preference training, for pairs and, where a prompt has several responses, for lists.

In a list `chosen` are the responses that nothing is preferred to and `rejected` all others; accuracies and margins
are means over its comparisons. For pairs all of these are TRL's.
"""

import torch
from torch import Tensor

from prefopt_cli.scoring.forward import ResponseScores
from prefopt_cli.training.batches import Lists

RowMetrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> per-row totals (B,) and the counts (B,) they are over."""


def policy_metrics(scores: ResponseScores, lists: Lists) -> RowMetrics:
    """Figures of the policy itself, from the scores of K responses."""
    logps, lengths, mean_logits, entropy, top1 = (
        lists.by_row(each)
        for each in (
            scores.logps.detach(),
            scores.lengths,
            scores.mean_logits,
            scores.entropy,
            scores.top1,
        )
    )
    sides = {"chosen": lists.chosen, "rejected": lists.rejected}

    def total(values: Tensor, side: Tensor) -> Tensor:
        return (values * side).sum(1)

    return {
        "entropy": (entropy.sum(1), lengths.sum(1)),
        "mean_token_accuracy": (total(top1, lists.chosen), total(lengths, lists.chosen)),
        **{
            f"logits/{name}": (total(mean_logits, side), total(lengths, side)) for name, side in sides.items()
        },
        **{f"logps/{name}": (total(logps, side), side.sum(1)) for name, side in sides.items()},
    }


def reward_metrics(rewards: Tensor, lists: Lists) -> RowMetrics:
    """Figures of implicit rewards (B, N)."""
    rewards = rewards.detach()
    margins = rewards[:, :, None] - rewards[:, None, :]
    preferred = lists.preferred
    comparisons = preferred.sum((1, 2))

    def total(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0).flatten(1).sum(1)

    return {
        "rewards/chosen": (total(rewards, lists.chosen), lists.chosen.sum(1)),
        "rewards/rejected": (total(rewards, lists.rejected), lists.rejected.sum(1)),
        "rewards/accuracies": (total((margins > 0).float(), preferred), comparisons),
        "rewards/margins": (total(margins, preferred), comparisons),
    }
