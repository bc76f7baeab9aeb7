"""Targets against what minimising the very loss finds."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prefopt_cli.errors import UserError
from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS
from prefopt_cli.losses.soft import soft_best_of_n_loss, soft_pair_loss, soft_ranked_loss
from prefopt_cli.recipe.schema import GPOSettings, SoftSettings
from prefopt_cli.sandbox.targets import (
    SMALLEST,
    closed_form,
    log_normalised,
    softmax_target,
    total_variation,
)

REWARDS = np.array([0.0, 0.3, 1.0, 1.0, 2.5, -1.0, 0.7])
BASE = log_normalised(np.array([0.0, 1.0, 0.5, -1.0, -0.5, 0.2, 0.0]))


def _minimiser(loss: str, beta: float, temperature: float) -> np.ndarray:
    """A free categorical policy, trained on all pairs of two independent draws from the base policy."""
    base = torch.tensor(BASE)
    f = CONVEX_FUNCTIONS[loss]

    def expected(logps: torch.Tensor) -> torch.Tensor:
        log_ratio = logps - base
        z = beta * (log_ratio[:, None] - log_ratio[None, :])
        pairs, preferred = _labelled_pairs(temperature)
        return (pairs * (preferred * f(z) + (1 - preferred) * f(-z))).sum()

    return _minimised(expected)


def _labelled_pairs(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How often the base policy offers a pair, and how often its first response is preferred."""
    base, rewards = torch.tensor(BASE), torch.tensor(REWARDS)
    return base.exp()[:, None] * base.exp()[None, :], torch.sigmoid(
        (rewards[:, None] - rewards[None, :]) / temperature
    )


def _minimised(expected: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """The log-probabilities of the free categorical policy at which this loss is least."""
    scores = torch.tensor(BASE).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = expected(scores.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return scores.detach().log_softmax(0).numpy()


@pytest.mark.parametrize("loss", ["logistic", "savage", "exponential", "squared"])
@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.5, 2.0)])
def test_closed_forms_are_the_minimisers(loss: str, beta: float, temperature: float) -> None:
    target = closed_form(GPOSettings(name="gpo", loss=loss, beta=beta), temperature)
    assert target is not None
    found = target.distribution(BASE, REWARDS)
    assert total_variation(_minimiser(loss, beta, temperature), found) < 1e-4


def _soft(**settings: Any) -> SoftSettings:
    return SoftSettings(name="soft", **{"kl_coef": 0, **settings})


def _expected_soft_loss(logps: torch.Tensor, kind: str, alpha: float, temperature: float) -> torch.Tensor:
    """Over pairs, or lists of three, of independent draws from the base policy, labelled by Plackett-Luce."""
    if kind == "pairs":
        pairs, preferred = _labelled_pairs(temperature)
        first, second = torch.broadcast_tensors(logps[:, None], logps[None, :])
        return (2 * pairs * preferred * soft_pair_loss(first, second, alpha=alpha)).sum()
    base, worth = torch.tensor(BASE), torch.tensor(REWARDS) / temperature
    drawn = torch.tensor(list(itertools.product(range(len(REWARDS)), repeat=3)))
    total = logps.new_zeros(())
    mask = torch.ones_like(drawn, dtype=torch.bool)
    for order in itertools.permutations(range(3)):
        # One of the equal lists in this order; its chance is that of every place going to the next one.
        listed = drawn[:, list(order)]
        chance = base[listed].sum(1)
        for place in range(2 if kind == "ranked" else 1):
            chance = chance + worth[listed[:, place]] - worth[listed[:, place:]].logsumexp(1)
        if kind == "ranked":
            losses = soft_ranked_loss(logps[listed], torch.arange(3).expand_as(listed), mask, alpha=alpha)
        else:  # every winner stands first in two of the six orders
            losses = 0.5 * soft_best_of_n_loss(
                logps[listed], torch.zeros(len(listed), dtype=torch.long), mask, alpha=alpha
            )
        total = total + (chance.exp() * losses).sum()
    return total


@pytest.mark.parametrize("kind", ["pairs", "best_of_n", "ranked"])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5), (0.5, 1.0)])
def test_the_closed_form_of_soft_is_its_minimiser(kind: str, alpha: float, temperature: float) -> None:
    """softmax(r / (alpha T)), whatever the base policy and however the responses are compared."""
    target = closed_form(_soft(alpha=alpha), temperature)
    assert target is not None
    assert target.name == f"softmax(r / {alpha * temperature:g})"
    found = _minimised(lambda logps: _expected_soft_loss(logps, kind, alpha, temperature))
    assert total_variation(found, target.distribution(BASE, REWARDS)) < 1e-4


def test_soft_has_a_closed_form_only_without_kl_and_noise_enough() -> None:
    assert closed_form(_soft(kl_coef=0.1), 1.0) is None
    assert closed_form(_soft(length_normalize=True), 1.0) is None
    assert closed_form(_soft(), 0.0) is None
    assert closed_form(_soft(alpha=1e-4), 1e-4) is None
    weighted = closed_form(_soft(mu={"gamma": 0.5}), 1.0)
    assert weighted is not None  # a pair weighs the same whichever response won
    assert weighted.name == "softmax(r / 1)"


def test_the_forms_differ_where_they_should() -> None:
    """The test above must be able to fail."""
    made = {
        loss: closed_form(GPOSettings(name="gpo", loss=loss, beta=1.0), 1.0)
        for loss in ("logistic", "exponential", "squared")
    }
    logps = {loss: target.distribution(BASE, REWARDS) for loss, target in made.items() if target}
    assert total_variation(logps["logistic"], logps["exponential"]) > 0.05
    assert total_variation(logps["exponential"], logps["squared"]) > 0.01


def test_without_label_noise() -> None:
    """The log-odds are infinite, so only squared, which is bounded, keeps its form."""
    assert closed_form(GPOSettings(name="gpo", loss="logistic"), 0.0) is None
    squared = closed_form(GPOSettings(name="gpo", loss="squared", beta=1.0), 0.0)
    assert squared is not None
    sharp = closed_form(GPOSettings(name="gpo", loss="squared", beta=1.0), 1e-6)
    assert sharp is not None
    assert np.allclose(squared.distribution(BASE, REWARDS), sharp.distribution(BASE, REWARDS))


def test_no_form_is_claimed_where_there_is_none() -> None:
    for loss in ("hinge", "truncated_quadratic", "my_module:f"):
        assert closed_form(GPOSettings(name="gpo", loss=loss), 1.0) is None
    assert closed_form(GPOSettings(name="gpo", loss="logistic", length_normalize=True), 1.0) is None


def test_softmax_by_hand() -> None:
    logps = softmax_target(2.0).distribution(BASE[:2], np.array([0.0, 2 * np.log(3.0)]))
    assert np.exp(logps) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e-320, float("nan"), float("inf")])
def test_alpha_is_a_number_to_divide_by(alpha: float) -> None:
    with pytest.raises(UserError, match="at least 1e-06"):
        softmax_target(alpha)


def test_the_smallest_divisors_make_distributions() -> None:
    """Less would not: its quotients are infinite."""
    for target in (
        softmax_target(SMALLEST),
        closed_form(GPOSettings(name="gpo", loss="logistic", beta=SMALLEST), 1.0),
    ):
        assert target is not None
        assert np.exp(target.distribution(BASE, REWARDS)).sum() == pytest.approx(1.0)
    assert closed_form(GPOSettings(name="gpo", loss="logistic", beta=0.5), 1e-320) is None


def test_total_variation_by_hand() -> None:
    target = np.log([0.5, 0.5])
    assert total_variation(np.log([0.5, 0.5]), target) == pytest.approx(0.0)
    assert total_variation(np.log([0.9, 0.1]), target) == pytest.approx(0.4)
    # A fifth of this policy's samples are no replies at all; the target has none of them.
    assert total_variation(np.log([0.4, 0.4]), target) == pytest.approx(0.2)
