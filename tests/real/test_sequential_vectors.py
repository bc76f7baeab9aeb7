"""Sequential losses against the reference numbers: 1e-9 in float64, 1e-5 relative in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt_cli.losses.sequential import implicit_reward_margins, sequential_loss
from tests.real.test_vectors import TOLERANCE

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Any]:
    """The file; no number in it is left out below."""
    found: dict[str, Any] = json.loads((shared / "vectors" / "sequential.json").read_text())
    given = {"deltas", "delta_policy", "betas", "lambdas"}
    assert set(found) == given | {"margins", "argument", "per_pair", "stage2"}
    assert set(found["per_pair"]) == {"logistic", "hinge", "squared"}
    assert set(found["stage2"]) == {"argument"}
    assert [len(found[name]) for name in ("deltas", "betas", "lambdas", "margins")] == [4, 4, 4, 3]
    return found


def _stage(vectors: dict[str, Any], stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a stage begins with, and its own beta and lambdas."""
    return {
        "deltas": [torch.tensor(delta, dtype=dtype) for delta in vectors["deltas"][:stage]],
        "beta": vectors["betas"][stage - 1],
        "betas": vectors["betas"][: stage - 1],
        "lambdas": vectors["lambdas"][:stage],
    }


def _close(found: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), **TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_margins(vectors: dict[str, Any], dtype: torch.dtype) -> None:
    given = _stage(vectors, 4, dtype)
    found = implicit_reward_margins(given["deltas"], given["betas"], given["lambdas"])
    for margin, wanted in zip(found, vectors["margins"], strict=True):
        _close(margin, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_argument(vectors: dict[str, Any], dtype: torch.dtype) -> None:
    policy = torch.tensor(vectors["delta_policy"], dtype=dtype)
    _close(sequential_loss(policy, **_stage(vectors, 4, dtype), loss=lambda z: z), vectors["argument"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loss", ["logistic", "hinge", "squared"])
def test_losses(vectors: dict[str, Any], loss: str, dtype: torch.dtype) -> None:
    policy = torch.tensor(vectors["delta_policy"], dtype=dtype)
    _close(sequential_loss(policy, **_stage(vectors, 4, dtype), loss=loss), vectors["per_pair"][loss])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_second_stage_alone(vectors: dict[str, Any], dtype: torch.dtype) -> None:
    """At its end, where its policy is pi_2: the argument is then its own reward margin."""
    policy = torch.tensor(vectors["deltas"][2], dtype=dtype)
    found = sequential_loss(policy, **_stage(vectors, 2, dtype), loss=lambda z: z)
    _close(found, vectors["stage2"]["argument"])
    _close(found, vectors["margins"][1])
