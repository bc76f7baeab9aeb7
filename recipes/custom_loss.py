"""A loss function of your own for method gpo: `loss: custom_loss:smoothed_hinge`.

The contract: a function of one tensor z = beta * rho of any shape, applied to each element, that returns
a tensor of that shape. It falls at zero (f'(0) < 0) and is convex; it is finite, with a finite gradient,
for the large |z| that single outliers reach.
"""

import torch
from torch import Tensor


def smoothed_hinge(z: Tensor, width: float = 1.0) -> Tensor:
    """(u + sqrt(u^2 + width^2)) / 2 with u = 1 - z: a hinge without the corner (squareplus).

    Like the hinge it grows linearly for pairs in the wrong order and stops pushing once the margin is
    reached; unlike it, it is smooth. As width goes to 0 it becomes max(0, 1 - z).
    f'(0) = -(1 + 1/sqrt(2)) / 2 = -0.854 and |f''(0)/f'(0)| = 0.207 at width 1.
    """
    u = 1 - z
    return (u + torch.hypot(u, torch.full_like(u, width))) / 2


def noisy_logistic(z: Tensor, flipped: float = 0.1) -> Tensor:
    """(1 - flipped) log(1 + e^-z) + flipped log(1 + e^z): logistic where a share of the labels is wrong.

    The least loss lies at a finite margin, z = log((1 - flipped) / flipped), instead of at infinity.
    f'(0) = flipped - 1/2 = -0.4 and |f''(0)/f'(0)| = 0.625 at flipped 0.1.
    """
    softplus = torch.nn.functional.softplus
    return (1 - flipped) * softplus(-z) + flipped * softplus(z)
