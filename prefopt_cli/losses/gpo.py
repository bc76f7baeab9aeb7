"""Generalized Preference Optimization (Tang et al., ICML 2024, arXiv 2402.05749).

One family of offline losses, ``L = E[f(beta * rho)]`` with
``rho = (log pi(y_w|x) - log pi(y_l|x)) - (log pi_ref(y_w|x) - log pi_ref(y_l|x))``
and a convex f with f'(0) < 0 (eq. 4 of the paper). DPO, IPO and SLiC are members.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ConvexFunction = Callable[[Tensor], Tensor]

EXPONENTIAL_LINEAR_BELOW = -15.0
"""Where `exponential` turns linear, so that one outlier cannot destroy a run (our choice)."""


def logistic(z: Tensor) -> Tensor:
    """log(1 + e^-z), the loss of DPO."""
    return -F.logsigmoid(z)


def hinge(z: Tensor) -> Tensor:
    """max(0, 1 - z), the loss of SLiC."""
    return torch.relu(1 - z)


def squared(z: Tensor) -> Tensor:
    """(z - 1)^2, the loss of IPO."""
    return (z - 1).square()


def exponential(z: Tensor) -> Tensor:
    """e^-z for z >= -15; below, its tangent at -15 (value and slope are continuous there)."""
    clamped = z.clamp(min=EXPONENTIAL_LINEAR_BELOW)
    return torch.exp(-clamped) * (1 + (clamped - z))


def truncated_quadratic(z: Tensor) -> Tensor:
    """max(0, 1 - z)^2."""
    return torch.relu(1 - z).square()


def savage(z: Tensor) -> Tensor:
    """1 / (1 + e^z)^2. It stands in the paper's table, but it is not convex."""
    return torch.sigmoid(-z).square()


CONVEX_FUNCTIONS: dict[str, ConvexFunction] = {
    "logistic": logistic,
    "hinge": hinge,
    "squared": squared,
    "exponential": exponential,
    "truncated_quadratic": truncated_quadratic,
    "savage": savage,
}
"""f by the name that a recipe's ``method.loss`` gives it, in the order of the paper's table."""


def length_normalized(logps: Tensor, lengths: Tensor | None) -> Tensor:
    """Log-probabilities (B,) per response token; unchanged without `lengths` (B,)."""
    return logps if lengths is None else logps / lengths.clamp(min=1)


def log_ratio_margin(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """rho (B,): by how much more than the reference the policy prefers the chosen response, in nats.

    With lengths (B,), each log-ratio is divided by its number of response tokens first.
    """
    chosen = length_normalized(chosen_logps - ref_chosen_logps, chosen_lengths)
    rejected = length_normalized(rejected_logps - ref_rejected_logps, rejected_lengths)
    return chosen - rejected


def gpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss: str | ConvexFunction = "logistic",
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """f(beta * rho) for every pair (Tang et al. 2024, eq. 4).

    Args:
        chosen_logps, rejected_logps: (B,) summed log-probabilities under the policy, in nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference policy.
        loss: a name of `CONVEX_FUNCTIONS`, or f itself (elementwise).
        beta: strength of the pull towards the reference policy, > 0.
        chosen_lengths, rejected_lengths: (B,) response tokens; given together, they normalise.

    Returns:
        (B,) losses in float32 or the wider type of the inputs.

    Raises:
        KeyError: `loss` is no name of the table.
    """
    f = CONVEX_FUNCTIONS[loss] if isinstance(loss, str) else loss
    rho = log_ratio_margin(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    )
    return f(beta * rho)


def slope(f: ConvexFunction, z: Tensor) -> Tensor:
    """f'(z), elementwise, by automatic differentiation; works inside ``torch.no_grad`` too."""
    with torch.enable_grad():
        at = z.detach().clone().requires_grad_()
        return torch.autograd.grad(f(at).sum(), at)[0]


@dataclass(frozen=True)
class Probe:
    """What a grid of values says about a function that is to serve as f."""

    slope_at_zero: float
    """f'(0); must be negative, or the loss does not push the margin up."""
    curvature_ratio: float
    """|f''(0) / f'(0)|: the beta at which two losses behave alike scales with it (section 3 of the paper)."""
    convex: bool
    problems: tuple[str, ...]
    """Reasons to refuse f; empty for a usable function."""


PROBE_GRID = (-20.0, 20.0, 801)


def probe(f: ConvexFunction) -> Probe:
    """Look at f on a grid over [-20, 20]: shape, finite values and slopes, f'(0) < 0, convexity.

    Never raises for a bad f: what is wrong stands in `Probe.problems`.
    """
    z = torch.linspace(*PROBE_GRID, dtype=torch.float64)
    try:
        values, slopes = f(z), slope(f, z)
    except Exception as error:  # a user's function may raise anything
        return Probe(float("nan"), float("nan"), False, (f"it raises {type(error).__name__}: {error}",))
    problems = _problems(f, z, values, slopes)
    step = 1e-4
    near_zero = slope(f, torch.tensor([-step, 0.0, step], dtype=torch.float64))
    slope_at_zero = float(near_zero[1])
    if not slope_at_zero < 0:
        problems.append(f"f'(0) is {slope_at_zero:g} and must be negative")
    curvature = float(near_zero[2] - near_zero[0]) / (2 * step)
    ratio = abs(curvature / slope_at_zero) if slope_at_zero else float("nan")
    return Probe(slope_at_zero, ratio, not problems and _is_convex(values), tuple(problems))


def _problems(f: ConvexFunction, z: Tensor, values: Tensor, slopes: Tensor) -> list[str]:
    if values.shape != z.shape:
        return [
            f"it turns a tensor of shape {tuple(z.shape)} into {tuple(values.shape)}; it must be elementwise"
        ]
    problems = []
    if not torch.allclose(f(z.flip(0)).flip(0), values, equal_nan=True):
        problems.append("its value at one element depends on the others; it must be elementwise")
    for name, found in (
        ("value", values),
        ("slope", slopes),
        ("float32 value", f(z.float())),
        ("float32 slope", slope(f, z.float())),
    ):
        finite = torch.isfinite(found)
        if not finite.all():
            problems.append(f"its {name} at z = {float(z[~finite][0]):g} is not finite")
    return problems


def _is_convex(values: Tensor) -> bool:
    """Second differences on an even grid are not negative, up to rounding."""
    second = values[2:] - 2 * values[1:-1] + values[:-2]
    scale = values.abs().max().clamp(min=1.0)
    return bool((second >= -1e-12 * scale).all())
