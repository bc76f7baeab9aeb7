"""Sequential losses: the recursion of margins, signs, gradients, and the theorem about each stage's minimiser."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, gpo_loss, log_ratio_margin, slope
from prefopt_cli.losses.sequential import (
    implicit_reward_margins,
    margins_of_ratios,
    sequential_loss,
    weighted,
)
from prefopt_cli.models.ancestry import Ancestry, Stage
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.previous import previous_margins

BETAS = [0.1, 0.4, 0.05]
LAMBDAS = [[], [0.7], [0.4, 0.9], [0.3, 0.5, 0.2]]


def _f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- By hand ----------------------------------------------------------------------------------------------------


def test_margins_by_hand() -> None:
    """rho 2, -1 and 3. dR_1 = 0.5 * 2 = 1; dR_2 = 2 * -1 - 0.5 * 1 = -2.5; dR_3 = 1 * 3 - (2 * 1 + 0.2 * -2.5) = 1.5.

    Chosen and rejected exchanged: every sign turns.
    """
    deltas = [_f64(delta, -delta) for delta in (1.0, 3.0, 2.0, 5.0)]
    margins = implicit_reward_margins(deltas, [0.5, 2.0, 1.0], [[], [0.5], [2.0, 0.2]])
    assert [margin.tolist() for margin in margins] == [[1, -1], [-2.5, 2.5], [pytest.approx(1.5), -1.5]]


def test_loss_by_hand() -> None:
    """Stage 2: rho_1 = 4 - 1 = 3, dR_1 = 0.5 * 3 = 1.5; beta rho = 2 * (5 - 4) = 2; z = 2 - 0.4 * 1.5 = 1.4."""
    given = {"beta": 2.0, "betas": [0.5], "lambdas": [[], [0.4]]}
    for name, expected in {"logistic": math.log1p(math.exp(-1.4)), "squared": 0.16, "hinge": 0.0}.items():
        found = sequential_loss(_f64(5.0), [_f64(1.0), _f64(4.0)], loss=name, **given)
        assert found.tolist() == pytest.approx([expected], abs=1e-14)
    own = sequential_loss(_f64(5.0), [_f64(1.0), _f64(4.0)], loss=lambda z: 3 - z, **given)
    assert own.item() == pytest.approx(1.6)


# --- Against a direct computation ---------------------------------------------------------------------------------


def _direct_margins(deltas: Tensor, betas: Sequence[float], lambdas: Sequence[Sequence[float]]) -> Tensor:
    """(n - 1, B): the recursion is (1 + Lambda) dR = beta rho with Lambda strictly lower triangular, solved at once."""
    stages = len(betas)
    matrix = torch.eye(stages, dtype=torch.float64)
    for i, row in enumerate(lambdas[:stages]):
        matrix[i, : len(row)] = _f64(*row)
    return torch.linalg.solve(matrix, _f64(*betas)[:, None] * deltas.diff(dim=0))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_margins_and_argument_against_a_direct_computation(stages: int) -> None:
    deltas, policy = _random(stages + 1, 32, scale=20), _random(32, seed=1, scale=20)
    wanted = _direct_margins(deltas, BETAS[:stages], LAMBDAS)
    found = implicit_reward_margins(list(deltas), BETAS[:stages], LAMBDAS[: stages + 1])
    torch.testing.assert_close(torch.stack(found), wanted, rtol=0, atol=1e-12)
    ratios = margins_of_ratios(list(deltas.diff(dim=0)), BETAS[:stages], LAMBDAS[:stages])
    assert all(torch.equal(*each) for each in zip(found, ratios, strict=True))
    argument = sequential_loss(
        policy,
        list(deltas),
        beta=0.3,
        betas=BETAS[:stages],
        lambdas=LAMBDAS[: stages + 1],
        loss=lambda z: z,
    )
    own = _f64(*LAMBDAS[stages])
    torch.testing.assert_close(argument, 0.3 * (policy - deltas[-1]) - own @ wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", CONVEX_FUNCTIONS)
def test_without_weights_it_is_gpo(loss: str) -> None:
    """Naive sequential training, to the last bit; the reference is the last policy, not the base."""
    deltas, policy = _random(3, 32, scale=20), _random(32, seed=1, scale=20)
    zeros = torch.zeros(32, dtype=torch.float64)
    found = sequential_loss(
        policy, list(deltas), beta=0.1, betas=[0.2, 0.3], lambdas=[[], [0.5], [0.0, 0.0]], loss=loss
    )
    assert torch.equal(found, gpo_loss(policy, zeros, deltas[-1], zeros, beta=0.1, loss=loss))


def test_the_first_stage_is_gpo() -> None:
    zeros, ref, policy = torch.zeros(8, dtype=torch.float64), _random(8), _random(8, seed=1)
    found = sequential_loss(policy, [ref], beta=0.2, betas=[], lambdas=[[]])
    assert torch.equal(found, gpo_loss(policy, zeros, ref, zeros, beta=0.2))
    assert implicit_reward_margins([ref], [], []) == []
    assert weighted([], []) == 0.0


def test_at_its_start_a_stage_knows_only_the_earlier_rewards() -> None:
    """The policy is its reference then, so its own reward is 0 and the argument is -sum lambda_i dR_i."""
    deltas = _random(3, 16, scale=20)
    margins = implicit_reward_margins(list(deltas), BETAS[:2], LAMBDAS)
    given = {"beta": 0.7, "betas": BETAS[:2], "lambdas": LAMBDAS[:3]}
    found = sequential_loss(deltas[-1], list(deltas), loss=lambda z: z, **given)
    torch.testing.assert_close(found, -(0.4 * margins[0] + 0.9 * margins[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["logistic", "squared", "exponential", "truncated_quadratic"])
def test_where_an_earlier_dimension_agrees_the_pull_is_stronger(loss: str) -> None:
    """Three pairs alike but for stage 1: it came to like the chosen response more, not at all, or less."""
    policy = _f64(0.0, 0.0, 0.0).requires_grad_()
    base, reference = _f64(-5.0, 0.0, 5.0), _f64(0.0, 0.0, 0.0)
    (margin,) = implicit_reward_margins([base, reference], [0.1], [[]])
    assert margin.tolist() == [0.5, 0, -0.5]
    given = {"beta": 0.2, "betas": [0.1], "loss": loss}
    pulls = []
    for own in ([0.8], [0.0], [1.6]):
        losses = sequential_loss(policy, [base, reference], lambdas=[[], own], **given)
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert (gradient < 0).all()  # all of them push the chosen response up
        pulls.append(-gradient)
        weight = slope(CONVEX_FUNCTIONS[loss], -own[0] * margin).abs()
        torch.testing.assert_close(pulls[-1], 0.2 * weight, rtol=0, atol=1e-12)
    agrees, _, conflicts = pulls[0]
    assert agrees > pulls[0][1] > conflicts
    assert pulls[1][0] == pulls[1][1] == pulls[1][2]
    assert pulls[2][0] > agrees  # a larger lambda keeps the dimension more
    assert pulls[2][2] < conflicts


def test_gradient_against_differences() -> None:
    deltas = [_random(6, seed=seed, scale=3) for seed in (1, 2, 3)]
    policy = _random(6, scale=3).requires_grad_()
    given = {"beta": 0.5, "betas": BETAS[:2], "lambdas": LAMBDAS[:3]}
    assert torch.autograd.gradcheck(lambda delta: sequential_loss(delta, deltas, **given), policy)


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("betas", "lambdas"),
    [
        ([0.1], [[], [0.7], [0.4, 0.9]]),  # a beta too few
        ([0.1, 0.2, 0.3], [[], [0.7], [0.4, 0.9]]),
        ([0.1, 0.2], [[], [0.7]]),  # this stage's own are missing
        ([0.1, 0.2], [[], [0.7], [0.4, 0.9], [0.3, 0.5, 0.2]]),
        ([0.1, 0.2], [[], [0.7], [0.4]]),
        ([0.1, 0.2], [[], [], [0.4, 0.9]]),  # an earlier stage's row
        ([0.1, 0.2], [[0.5], [0.7], [0.4, 0.9]]),  # nothing came before the first
    ],
)
def test_numbers_that_do_not_fit_the_stages(betas: list[float], lambdas: list[list[float]]) -> None:
    deltas = list(_random(3, 4))
    sequential_loss(_random(4), deltas, beta=0.1, betas=[0.1, 0.2], lambdas=[[], [0.7], [0.4, 0.9]])
    with pytest.raises(ValueError, match=r"lambdas for|zip\(\)"):
        sequential_loss(_random(4), deltas, beta=0.1, betas=betas, lambdas=lambdas)


def test_margins_need_a_row_for_each_stage() -> None:
    deltas = list(_random(3, 4))
    for betas, lambdas in (([0.1], [[], [0.7]]), ([0.1, 0.2], [[]]), ([0.1, 0.2], [[], [0.7, 0.1]])):
        with pytest.raises(ValueError, match=r"lambdas for|zip\(\)"):
            implicit_reward_margins(deltas, betas, lambdas)


def test_unknown_loss() -> None:
    with pytest.raises(KeyError):
        sequential_loss(_f64(0.0), [_f64(0.0)], beta=0.1, betas=[], lambdas=[[]], loss="dpo")


# --- Per token ----------------------------------------------------------------------------------------------------


def _ancestry(*normalized: bool) -> Ancestry:
    """Stages with the betas and lambdas above; the policies themselves are not looked at."""
    nothing = PolicySource("nowhere")
    stages = tuple(
        Stage(f"d{i}", RunFolder(Path(f"d{i}")), f"id-{i}", nothing, BETAS[i], tuple(LAMBDAS[i]), each)
        for i, each in enumerate(normalized)
    )
    return Ancestry(nothing, stages, tuple(LAMBDAS[len(stages)]), nothing)


def test_stages_that_trained_on_ratios_per_token_are_measured_so() -> None:
    """Each stage by its own setting: only then is beta_i rho_i what it was trained towards."""
    logps, lengths = _random(4, 16, 2, scale=30), torch.arange(1, 33).view(16, 2)
    normalized = (True, False, True)
    ratios = [
        log_ratio_margin(
            *after.unbind(1), *before.unbind(1), *(lengths.double().unbind(1) if each else (None, None))
        )
        for before, after, each in zip(logps[:-1], logps[1:], normalized, strict=True)
    ]
    wanted = torch.stack(margins_of_ratios(ratios, BETAS, LAMBDAS[:3]), 1)
    found = previous_margins(list(logps), lengths, _ancestry(*normalized))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    deltas = [chosen - rejected for chosen, rejected in (each.unbind(1) for each in logps)]
    plain = torch.stack(implicit_reward_margins(deltas, BETAS, LAMBDAS[:3]), 1)
    torch.testing.assert_close(
        previous_margins(list(logps), lengths, _ancestry(False, False, False)), plain, rtol=0, atol=1e-11
    )
    assert (found - plain).abs().max() > 0.1


def test_margins_per_token_by_hand() -> None:
    """beta 0.1: chosen 6 nats over 3 tokens, rejected -4 over 2: 0.1 (2 + 2) = 0.4; as sums 0.1 (6 + 4) = 1."""
    logps, lengths = [_f64([-10, -10]), _f64([-4, -14])], torch.tensor([[3, 2]])
    assert previous_margins(logps, lengths, _ancestry(True)).tolist() == [[pytest.approx(0.4)]]
    assert previous_margins(logps, lengths, _ancestry(False)).tolist() == [[pytest.approx(1.0)]]


# --- The theorem: pi_n ~ pi_{n-1} exp((R_n + sum_i lambda_i R_i) / beta_n) ------------------------------------------

REWARDS = [
    _f64(0.0, 0.4, 1.0, 1.0, 2.5, -1.3, 0.7, -0.2),
    _f64(1.2, -0.5, 0.3, 0.0, -1.5, 0.9, 0.1, 0.6),  # mostly against the first
    _f64(-0.4, 0.8, 0.0, 1.1, -0.8, -0.7, 1.5, 1.0),
]
BASE = _random(8, seed=7, scale=0.5).log_softmax(0)
STAGE_BETAS = [1.2, 0.8, 0.9]
STAGE_LAMBDAS = [[], [0.7], [0.4, 0.9]]
WINNERS, LOSERS = torch.tensor(list(itertools.permutations(range(8), 2))).unbind(1)


def _deltas(logps: Tensor) -> Tensor:
    """Delta of all ordered pairs."""
    return logps[WINNERS] - logps[LOSERS]


def _minimiser(
    policies: Sequence[Tensor], lambdas: Sequence[Sequence[float]], *, start: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the free categorical policy that minimises a stage's expected loss over all pairs.

    Newton's method on the scores of all responses but the last: the loss is convex in them, so its gradient tells.
    """
    stage = len(policies)
    chances = torch.sigmoid(REWARDS[stage - 1][WINNERS] - REWARDS[stage - 1][LOSERS])
    deltas = [_deltas(policy) for policy in policies]

    def expected_loss(scores: Tensor) -> Tensor:
        logps = torch.cat((scores, scores.new_zeros(1))).log_softmax(0)
        given = {"beta": STAGE_BETAS[stage - 1], "betas": STAGE_BETAS[: stage - 1], "lambdas": lambdas}
        return (chances * sequential_loss(_deltas(logps), deltas, **given)).sum()

    first = policies[-1] if start is None else start
    scores = first[:-1] - first[-1]
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(expected_loss, scores)
        step = torch.linalg.solve(torch.autograd.functional.hessian(expected_loss, scores), gradient)
        while expected_loss(scores - step) > expected_loss(scores) + 1e-13:
            step = step / 2
        scores = scores - step
    assert gradient.abs().max() < 1e-11
    return torch.cat((scores, scores.new_zeros(1))).log_softmax(0)


def _closed_forms() -> list[Tensor]:
    """pi_0 ... pi_3 by the true rewards, as log-probabilities."""
    found = [BASE]
    for n, (beta, row) in enumerate(zip(STAGE_BETAS, STAGE_LAMBDAS, strict=True)):
        kept = sum((weight * REWARDS[i] for i, weight in enumerate(row)), torch.zeros_like(BASE))
        found.append((found[-1] + (REWARDS[n] + kept) / beta).log_softmax(0))
    return found


def _total_variation(one: Tensor, two: Tensor) -> float:
    return float((one.exp() - two.exp()).abs().sum() / 2)


def test_every_stage_ends_at_its_closed_form() -> None:
    """Stage after stage, each knowing of the earlier ones nothing but the policies that they ended with."""
    policies, wanted = [BASE], _closed_forms()
    for stage in (1, 2, 3):
        policies.append(_minimiser(policies, STAGE_LAMBDAS[:stage]))
        assert _total_variation(policies[-2], wanted[stage]) > 0.15  # it had a way to go
        torch.testing.assert_close(policies[-1], wanted[stage], rtol=0, atol=1e-8)  # 1e-6 is asked for


def test_the_minimiser_does_not_depend_on_the_start() -> None:
    wanted = _closed_forms()
    found = _minimiser(wanted[:3], STAGE_LAMBDAS, start=_random(8, seed=3, scale=0.5))
    torch.testing.assert_close(found, wanted[3], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("lambdas", "misses"),
    [
        ([[], [0.7], [-0.4, -0.9]], "the loss"),
        ([[], [-0.7], [0.4, 0.9]], "the reward of stage 2"),
        ([[], [0.7], [0.0, 0.0]], "naive sequential training"),
    ],
)
def test_with_plus_instead_of_minus_it_misses(lambdas: list[list[float]], misses: str) -> None:
    """A negative lambda is a plus sign: in the loss, or in the recursion."""
    wanted = _closed_forms()
    assert _total_variation(_minimiser(wanted[:3], lambdas), wanted[3]) > 0.05, misses


def test_a_kept_dimension_stays_up_where_naive_training_gives_it_away() -> None:
    """The expected first reward after stage 2, whose own reward is mostly against it, rises with lambda."""
    first = _closed_forms()[1]
    found = [float(_minimiser([BASE, first], [[], [each]]).exp() @ REWARDS[0]) for each in (0.0, 0.5, 1.0)]
    assert found[0] < float(first.exp() @ REWARDS[0])
    assert found[0] + 0.1 < found[1] < found[2] - 0.1
