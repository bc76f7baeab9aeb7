"""What a policy would be if training met its optimum: distributions over the well-formed replies to a prompt.

``closed-form`` is the minimiser of a method's expected loss under Bradley-Terry labels at temperature T, over all
policies, for pairs drawn independently from the base policy (the rows compare different replies, which hardly
matters among thousands) and for replies that are well-formed, as 98 of 100 are. For f(beta * rho) the minimiser of a
pair with preference probability p = sigmoid(dr / T) has beta * drho = argmin_z p f(z) + (1 - p) f(-z), which is

- ``logistic`` and ``savage``: log p / (1 - p) = dr / T, so pi ~ pi_ref exp(r / (beta T)) (Rafailov et al. 2023, eq. 4);
- ``exponential``: half of that, so pi ~ pi_ref exp(r / (2 beta T));
- ``squared``: 2p - 1, which is no difference of two rewards; its least-squares fit under independent pairs is
  g(y) = E_y'[2 p(y over y') - 1], so pi ~ pi_ref exp(g / beta) (Azar et al. 2024, section 5).

``hinge`` and ``truncated_quadratic`` have no such form: their optimum runs off, or depends on where they are cut off.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Method, SelfSupervisedSettings, SequentialSettings, SoftSettings

BLOCK = 256
SMALLEST = 1e-6
"""Of what rewards are divided by: with less, only rounding would decide between replies, or nothing at all."""

Target = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(base log-probabilities (2304,), gold rewards (2304,)) -> log-probabilities (2304,) that sum to one."""


@dataclass(frozen=True)
class NamedTarget:
    """A target and how to call it."""

    name: str
    distribution: Target


def softmax_target(alpha: float) -> NamedTarget:
    """softmax(r / alpha) over the well-formed replies; the base policy has no part in it.

    Raises:
        UserError: alpha is not a positive number, or too small to divide by.
    """
    if not SMALLEST <= alpha < float("inf"):
        raise UserError(f"The target softmax:ALPHA needs a number of at least {SMALLEST:g}, not {alpha:g}.")
    return NamedTarget(f"softmax(r / {alpha:g})", lambda _, rewards: log_normalised(rewards / alpha))


def closed_form(method: Method, temperature: float) -> NamedTarget | None:
    """The optimum of a method on preferences labelled at this temperature, None if it has no closed form."""
    if isinstance(method, SelfSupervisedSettings):
        return closed_form(method.align, temperature) if method.ssl_coef == 0 else None
    if method.length_normalize or isinstance(method, SequentialSettings):
        return None  # a stage's optimum is relative to the policy before it, which was trained
    if isinstance(method, SoftSettings):
        scale = method.alpha * temperature
        return None if method.samples or scale < SMALLEST else softmax_target(scale)
    beta = method.beta
    if method.loss == "squared":
        return NamedTarget(
            f"pi_base exp(E[2 p - 1] / {beta:g})",
            lambda base, rewards: log_normalised(base + _expected_win(base, rewards, temperature) / beta),
        )
    shares = {"logistic": 1.0, "savage": 1.0, "exponential": 0.5}
    if method.loss not in shares or beta * temperature < SMALLEST:
        return None
    scale = shares[method.loss] / (beta * temperature)
    return NamedTarget(
        f"pi_base exp({scale:g} r)", lambda base, rewards: log_normalised(base + scale * rewards)
    )


def total_variation(logps: np.ndarray, target: np.ndarray) -> float:
    """Exact total variation distance, in [0, 1], of a policy to a target on the well-formed replies.

    Args:
        logps: (2304,) of the policy; what they lack to one is the policy's share of other texts.
        target: (2304,) log-probabilities that sum to one.
    """
    policy = np.exp(logps)
    return float(0.5 * (np.abs(policy - np.exp(target)).sum() + max(0.0, 1.0 - policy.sum())))


def log_normalised(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities proportional to exp(scores)."""
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def _expected_win(base: np.ndarray, rewards: np.ndarray, temperature: float) -> np.ndarray:
    """(2304,) E_y'[2 p(y over y') - 1] for y' of the base policy."""
    weights = np.exp(log_normalised(base))
    expected = np.empty_like(rewards)
    for start in range(0, len(rewards), BLOCK):
        difference = rewards[start : start + BLOCK, None] - rewards[None, :]
        # 2 sigmoid(x) - 1 = tanh(x / 2)
        won = np.sign(difference) if temperature == 0 else np.tanh(difference / (2 * temperature))
        expected[start : start + BLOCK] = won @ weights
    return expected
