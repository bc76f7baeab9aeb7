"""The GPO family against hand arithmetic, at extreme arguments, and the probe of a user's own f."""

import math

import pytest
import torch

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, gpo_loss, log_ratio_margin, probe, slope
from prefopt_cli.recipe.schema import GPO_LOSSES

# name: f(0), f'(0), |f''(0)/f'(0)|, and f(2): the table of methods.md and a second point, by hand.
TABLE = {
    "logistic": (math.log(2), -1 / 2, 1 / 2, math.log1p(math.exp(-2))),
    "hinge": (1.0, -1.0, 0.0, 0.0),
    "squared": (1.0, -2.0, 1.0, 1.0),
    "exponential": (1.0, -1.0, 1.0, math.exp(-2)),
    "truncated_quadratic": (1.0, -2.0, 1.0, 0.0),
    "savage": (1 / 4, -1 / 4, 1 / 2, 1 / (1 + math.exp(2)) ** 2),
}


def test_recipe_and_losses_name_the_same_functions() -> None:
    assert tuple(CONVEX_FUNCTIONS) == GPO_LOSSES == tuple(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str) -> None:
    at_zero, slope_at_zero, ratio, at_two = TABLE[name]
    f = CONVEX_FUNCTIONS[name]
    values = f(torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert values.tolist() == pytest.approx([at_zero, at_two], abs=1e-12)
    found = probe(f)
    assert found.slope_at_zero == pytest.approx(slope_at_zero)
    assert found.curvature_ratio == pytest.approx(ratio, abs=1e-6)
    assert found.problems == ()
    assert found.convex == (name != "savage")


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_arguments_stay_finite(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([-1e4, -88.8, -20.0, 20.0, 88.8, 1e4], dtype=dtype, requires_grad=True)
    values = CONVEX_FUNCTIONS[name](z)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()


def test_exponential_is_exact_to_minus_15_and_its_tangent_below() -> None:
    f = CONVEX_FUNCTIONS["exponential"]
    z = torch.tensor([-15.0, -14.0, -16.0, -100.0], dtype=torch.float64)
    e15 = math.exp(15)
    assert f(z).tolist() == pytest.approx([e15, math.exp(14), e15 * 2, e15 * 86], rel=1e-12)
    assert slope(f, z).tolist() == pytest.approx([-e15, -math.exp(14), -e15, -e15], rel=1e-12)


def test_one_pair_by_hand() -> None:
    # rho = (-10 - -12) - (-11 - -11.5) = 2 - 0.5 = 1.5; z = 0.2 * 1.5 = 0.3
    values = [torch.tensor([v]) for v in (-10.0, -12.0, -11.0, -11.5)]
    assert gpo_loss(*values, loss="squared", beta=0.2).item() == pytest.approx((0.3 - 1) ** 2)
    assert gpo_loss(*values, loss="hinge", beta=0.2).item() == pytest.approx(0.7)


def test_length_normalization_divides_each_log_ratio() -> None:
    # chosen log-ratio 1 over 2 tokens, rejected log-ratio -0.5 over 5 tokens: 0.5 + 0.1
    values = [torch.tensor([v]) for v in (-10.0, -12.0, -11.0, -11.5)]
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([5])}
    assert log_ratio_margin(*values, **lengths).item() == pytest.approx(0.6)
    assert gpo_loss(*values, loss="squared", beta=0.5, **lengths).item() == pytest.approx((0.3 - 1) ** 2)


def test_policy_equal_to_reference_gives_f_of_zero() -> None:
    logps = torch.tensor([-5.0, -7.0])
    assert gpo_loss(logps, logps, logps, logps, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_own_function() -> None:
    values = [torch.tensor([v]) for v in (-10.0, -12.0, -11.0, -11.5)]
    assert gpo_loss(*values, loss=lambda z: 3 - z, beta=1.0).item() == pytest.approx(1.5)


def test_slope_works_without_grad_mode() -> None:
    with torch.no_grad():
        assert slope(CONVEX_FUNCTIONS["squared"], torch.tensor([0.0, 3.0])).tolist() == [-2.0, 4.0]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda z: z, "must be negative"),
        (lambda z: torch.log(z), "not finite"),
        (lambda z: (1 - z).mean(), "elementwise"),
        (lambda z: 1 - z + z.mean() * 0 + torch.arange(len(z)).to(z), "depends on the others"),
        (lambda z: torch.exp(-z * 10) * 1e300, "not finite"),
        (lambda z: -z.numpy(), "raises"),
        (lambda z: torch.ones_like(z), "raises"),
    ],
)
def test_probe_refuses(function, complaint: str) -> None:
    found = probe(function)
    assert any(complaint in problem for problem in found.problems), found
    assert not found.convex


def test_probe_notices_missing_convexity() -> None:
    found = probe(lambda z: torch.sigmoid(-z))
    assert found.problems == ()
    assert not found.convex
