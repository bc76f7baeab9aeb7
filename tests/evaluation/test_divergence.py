"""How far a policy is from its reference, on what it writes itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from prefopt_cli.evaluation.divergence import KLSettings, kl_to_reference
from prefopt_cli.evaluation.held_out import chosen_sets, held_out_sets
from prefopt_cli.evaluation.statistics import Estimate
from prefopt_cli.evaluation.targets import find_target
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.scoring.frozen import ScoringStopped
from prefopt_cli.training.reporting import Silent
from tests.evaluation.plain import load
from tests.tiny import write_pairs
from tests.training.conftest import (
    LORA,
    Run,
    shared_run,  # noqa: F401  (a fixture)
)

TOKENS = 2
"""A response is short enough to go through all there are."""

PROMPTS = 64


def kl(
    name: Path,
    prompts: int,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    reference: str | None = None,
    data: Path | None = None,
    **options: Any,
) -> Estimate | None:
    target = find_target(str(name), Silent(), RunFinder(), reference=reference)
    listed = [str(data)] if data else []
    settings = chosen_sets(target.recipe.dataset, listed, split=None, dimensions=[])
    sets = held_out_sets(target, settings, Silent())
    found = kl_to_reference(
        target, list(sets.values()), KLSettings(prompts, tokens, seed), Silent(), **options
    )
    assert found is None or found.prompts <= prompts
    return found.kl if found else None


def exact(policy: Any, reference: Any, world: Path, prompts: list[str]) -> tuple[float, float]:
    """KL over all responses of two tokens, or one if it is the last: the mean over the prompts, in nats.

    And the same with policy and reference exchanged.
    """
    tokenizer = AutoTokenizer.from_pretrained(world / "model")

    def steps(model: Any, rows: torch.Tensor) -> torch.Tensor:
        """(B, V) log-probabilities of the next token."""
        with torch.no_grad():
            found: torch.Tensor = model(rows, logits_to_keep=1).logits[:, -1].double().log_softmax(-1)
        return found

    def kl_of(own: torch.Tensor, its: torch.Tensor, after: torch.Tensor, its_after: torch.Tensor) -> float:
        rest = (after.exp() * (after - its_after)).sum(1)
        rest[tokenizer.eos_token_id] = 0  # the response ends there
        return float((own.exp() * (own - its + rest)).sum())

    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        own, its = (steps(model, ids)[0] for model in (policy, reference))
        every = torch.arange(len(own))
        longer = torch.cat([ids.expand(len(every), -1), every[:, None]], 1)
        after, its_after = (steps(model, longer) for model in (policy, reference))
        found.append((kl_of(own, its, after, its_after), kl_of(its, own, its_after, after)))
    forward, backward = np.mean(found, axis=0)
    return float(forward), float(backward)


def test_it_is_the_exact_kl(shared_run: Run, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    path = shared_run("far", "training.learning_rate=6.0e-2").run.path
    prompts = [f"{number}:" for number in range(PROMPTS)]
    rows = [{"prompt": each, "chosen": " Yes.", "rejected": " No."} for each in prompts]
    write_pairs(tmp_path / "many.jsonl", rows)
    forward, backward = exact(load(path / "model"), load(tiny_world / "model"), tiny_world, prompts)
    draws = [kl(path, PROMPTS, seed=1000 * number, data=tmp_path / "many.jsonl") for number in range(3)]
    values = [each.value for each in draws if each]
    error = np.mean([each.high - each.low for each in draws if each]) / 2 / 1.96 / np.sqrt(3)
    assert np.mean(values) == pytest.approx(forward, abs=4 * error)
    assert len(set(values)) == 3
    assert abs(forward - backward) > 6 * error, "too rough to tell one direction from the other"


@pytest.mark.parametrize("options", [(), (LORA,)])
def test_a_policy_that_has_not_moved(shared_run: Run, options: tuple[str, ...]) -> None:  # noqa: F811
    still = ("training.learning_rate=0", "training.max_steps=1")
    path = shared_run(f"still-{len(options)}", *options, *still).run.path
    assert kl(path, 4, tokens=16) == (0, 0, 0)


def test_the_seed_decides(shared_run: Run) -> None:  # noqa: F811
    path = shared_run("far", "training.learning_rate=6.0e-2").run.path
    first, again, other = (kl(path, 4, tokens=8, seed=seed) for seed in (0, 0, 1))
    assert first is not None
    assert first == again != other
    assert first.value > 0
    assert first.low < first.value < first.high


def test_prompts_that_leave_no_room(shared_run: Run) -> None:  # noqa: F811
    """The model's context holds 256 tokens."""
    path = shared_run("far", "training.learning_rate=6.0e-2").run.path
    assert kl(path, 8, tokens=255) is None


def test_without_a_reference(shared_run: Run) -> None:  # noqa: F811
    path = shared_run("far", "training.learning_rate=6.0e-2").run.path
    assert kl(path, 8, reference="none") is None


def test_a_signal(shared_run: Run) -> None:  # noqa: F811
    path = shared_run("far", "training.learning_rate=6.0e-2").run.path
    with pytest.raises(ScoringStopped):
        kl(path, 8, stopping=lambda: True)
