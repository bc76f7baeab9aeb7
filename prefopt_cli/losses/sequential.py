"""Sequential Preference Optimization (Lou et al., AAAI 2025, arXiv 2405.12739): one dimension after another.

Stage n starts from the policy pi_{n-1} that stage n-1 ended with, which is also its reference, and maximises its own
reward R_n while the rewards of earlier dimensions stay up. Its optimum is
``pi_n ~ pi_{n-1} exp((R_n + sum_{i<n} lambda_{n,i} R_i) / beta_n)``, so that rewards show in ratios of policies:
for a pair, with ``Delta_p = log p(y_w|x) - log p(y_l|x)``,

- ``dR_i = beta_i (Delta_{pi_i} - Delta_{pi_{i-1}}) - sum_{j<i} lambda_{i,j} dR_j``
- ``L_n = E[f(beta_n (Delta - Delta_{pi_{n-1}}) - sum_{i<n} lambda_{n,i} dR_i)]``

f is the logistic loss in the paper; here it may be any of the GPO family. A pair on which an earlier dimension agrees
(dR_i > 0) gets a smaller argument, hence a larger gradient, than one on which it disagrees.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, ConvexFunction


def implicit_reward_margins(
    deltas: Sequence[Tensor], betas: Sequence[float], lambdas: Sequence[Sequence[float]]
) -> list[Tensor]:
    """dR_1 ... dR_{n-1}, each (B,): how much more the dimension of each earlier stage rewards the chosen response.

    Args:
        deltas: (B,) Delta of pi_0 (the base) to pi_{n-1}, in nats: n of them.
        betas: beta_1 ... beta_{n-1}.
        lambdas: a row for each of stages 1 ... n-1, lambda_{i,1} ... lambda_{i,i-1}; the first is empty. Rows beyond
            these, such as stage n's own, are not looked at.

    Raises:
        ValueError: there are not as many betas or rows as stages, or a row has another length.
    """
    ratios = [later - earlier for earlier, later in itertools.pairwise(deltas)]
    return margins_of_ratios(ratios, betas, lambdas[: len(ratios)])


def margins_of_ratios(
    ratios: Sequence[Tensor], betas: Sequence[float], lambdas: Sequence[Sequence[float]]
) -> list[Tensor]:
    """The same from rho_i = Delta_{pi_i} - Delta_{pi_{i-1}} (B,), which some stages may have taken per token.

    Raises:
        ValueError: as in `implicit_reward_margins`.
    """
    margins: list[Tensor] = []
    for ratio, beta, row in zip(ratios, betas, lambdas, strict=True):
        margins.append(beta * ratio - weighted(margins, row))
    return margins


def weighted(margins: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor | float:
    """sum_i lambda_i dR_i (B,); 0.0 where no stage came before.

    Raises:
        ValueError: there are not as many lambdas as margins.
    """
    if len(margins) != len(lambdas):
        raise ValueError(f"{len(lambdas)} lambdas for {len(margins)} earlier stages")
    if not margins:
        return 0.0
    return torch.stack([weight * margin for weight, margin in zip(lambdas, margins, strict=True)]).sum(0)


def sequential_loss(
    delta_policy: Tensor,
    deltas: Sequence[Tensor],
    *,
    beta: float,
    betas: Sequence[float],
    lambdas: Sequence[Sequence[float]],
    loss: str | ConvexFunction = "logistic",
) -> Tensor:
    """f(beta_n (Delta - Delta_{pi_{n-1}}) - sum_i lambda_{n,i} dR_i) for every pair.

    Args:
        delta_policy: (B,) Delta of the policy in training, in nats.
        deltas: (B,) Delta of pi_0 to pi_{n-1}, the reference: n of them.
        beta: beta_n, strength of the pull towards the reference, > 0.
        betas: beta_1 ... beta_{n-1}.
        lambdas: n rows, lambda_{i,1} ... lambda_{i,i-1} of stage i; the last is this stage's own.
        loss: a name of `CONVEX_FUNCTIONS`, or f itself (elementwise).

    Returns:
        (B,) losses.

    Raises:
        KeyError: `loss` is no name of the table.
        ValueError: there are not as many betas or rows of lambdas as stages.
    """
    f = CONVEX_FUNCTIONS[loss] if isinstance(loss, str) else loss
    if len(lambdas) != len(deltas):
        raise ValueError(f"{len(lambdas)} rows of lambdas for stage {len(deltas)}")
    margins = implicit_reward_margins(deltas, betas, lambdas)
    return f(beta * (delta_policy - deltas[-1]) - weighted(margins, lambdas[-1]))
