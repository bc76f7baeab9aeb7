"""Losses against the reference numbers: 1e-9 in float64, 1e-5 relative in float32, gradients included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, gpo_loss
from prefopt_cli.losses.soft import soft_best_of_n_loss, soft_pair_loss, soft_ranked_loss, token_kl
from prefopt_cli.scoring.divergence import HeadStates, token_divergence

pytestmark = pytest.mark.real

SIDES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
TOLERANCE = {torch.float64: {"rtol": 0, "atol": 1e-9}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gpo(shared: Path, dtype: torch.dtype) -> None:
    vectors = json.loads((shared / "vectors" / "gpo.json").read_text())
    assert len(vectors["cases"]) == 18
    for case in vectors["cases"]:
        logps = {side: torch.tensor(vectors[side], dtype=dtype) for side in SIDES}
        logps["chosen_logps"].requires_grad_()
        logps["rejected_logps"].requires_grad_()
        losses = gpo_loss(**logps, loss=case["loss"], beta=case["beta"])
        by_chosen, by_rejected = torch.autograd.grad(
            losses.sum(), [logps["chosen_logps"], logps["rejected_logps"]]
        )
        keep = [i for i in range(losses.numel()) if i not in set(case.get("skip_rows", []))]
        assert keep
        for got, wanted in ((losses, "per_pair"), (by_chosen, "d_chosen"), (by_rejected, "d_rejected")):
            expected = torch.tensor(case[wanted], dtype=dtype)
            torch.testing.assert_close(got[keep], expected[keep], **TOLERANCE[dtype])


def test_gpo_at_zero(shared: Path) -> None:
    at_zero = json.loads((shared / "vectors" / "gpo.json").read_text())["at_zero"]
    assert set(at_zero) == set(CONVEX_FUNCTIONS)
    for name, expected in at_zero.items():
        assert CONVEX_FUNCTIONS[name](torch.zeros((), dtype=torch.float64)).item() == pytest.approx(
            expected["value"], abs=1e-12
        )


@pytest.fixture(scope="module")
def soft(shared: Path) -> dict[str, Any]:
    vectors = json.loads((shared / "vectors" / "soft.json").read_text())
    assert {name: len(cases) for name, cases in vectors.items()} == {
        "pair": 4,
        "best_of_n": 4,
        "ranked": 4,
        "token_kl": 2,
    }
    return vectors


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_soft_pairs(soft: dict[str, Any], dtype: torch.dtype) -> None:
    for case in soft["pair"]:
        chosen = torch.tensor(case["chosen_logps"], dtype=dtype, requires_grad=True)
        rejected = torch.tensor(case["rejected_logps"], dtype=dtype, requires_grad=True)
        losses = soft_pair_loss(chosen, rejected, alpha=case["alpha"])
        by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
        slope = torch.tensor(case["d_chosen"], dtype=dtype)
        wanted = torch.tensor(case["per_pair"], dtype=dtype)
        for got, expected in ((losses, wanted), (by_chosen, slope), (by_rejected, -slope)):
            torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kind", "function", "choice"),
    [("best_of_n", soft_best_of_n_loss, "best"), ("ranked", soft_ranked_loss, "ranks")],
)
def test_soft_lists(
    soft: dict[str, Any], kind: str, function: Callable[..., torch.Tensor], choice: str, dtype: torch.dtype
) -> None:
    for case in soft[kind]:
        logps, mask = torch.tensor(case["logps"], dtype=dtype), torch.tensor(case["mask"])
        found = function(logps, torch.tensor(case[choice]), mask, alpha=case["alpha"])
        torch.testing.assert_close(found, torch.tensor(case["per_row"], dtype=dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_soft_token_kl(soft: dict[str, Any], dtype: torch.dtype) -> None:
    for case in soft["token_kl"]:
        policy, ref = (torch.tensor(case[name], dtype=dtype) for name in ("policy_logits", "ref_logits"))
        found = token_kl(policy, ref, torch.tensor(case["mask"]))
        torch.testing.assert_close(found, torch.tensor(case["per_row"], dtype=dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_soft_token_kl_as_training_computes_it(soft: dict[str, Any], dtype: torch.dtype) -> None:
    """Through the head, in chunks: hidden states that are the logits already, and a head that is the identity."""
    for case in soft["token_kl"]:
        policy, ref = (torch.tensor(case[name], dtype=dtype) for name in ("policy_logits", "ref_logits"))
        head, mask = torch.eye(policy.size(-1), dtype=dtype), torch.tensor(case["mask"])
        targets = torch.zeros(policy.shape[:2], dtype=torch.long).flatten()
        states = HeadStates(ref.flatten(0, 1), head.clone(), None)
        found = token_divergence(policy.flatten(0, 1), head, targets, states).kl.view(mask.shape) * mask
        torch.testing.assert_close(
            found.sum(1), torch.tensor(case["per_row"], dtype=dtype), **TOLERANCE[dtype]
        )
