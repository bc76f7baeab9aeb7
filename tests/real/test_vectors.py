"""Losses against the reference numbers: 1e-9 in float64, 1e-5 relative in float32, gradients included."""

import json
from pathlib import Path

import pytest
import torch

from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, gpo_loss

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
