"""What evaluations are held against: plain transformers, and sets whose figures can be worked out by hand."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.data.examples import Comparison
from prefopt_cli.evaluation.evaluate import Evaluation, evaluate
from prefopt_cli.evaluation.held_out import HeldOutSet, chosen_sets, held_out_sets
from prefopt_cli.evaluation.overlap import Trained
from prefopt_cli.evaluation.scored import ScoredSet, scored_set
from prefopt_cli.evaluation.targets import Reward, find_target
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent

REWARD = Reward(0.1, "beta", relative=True, per_token=False)


class Sides(NamedTuple):
    """(N,) of every pair's responses."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        return self.chosen - self.rejected


class Plain(NamedTuple):
    """A policy's view of a file of pairs."""

    logps: Sides
    tokens: Sides


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(weights: Path, *adapters: Path) -> Any:
    """Full weights, with at most one adapter on them."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def by_hand(model: Any, tokenizer_of: Path, rows: Iterable[dict[str, Any]]) -> Plain:
    """One response at a time, with nothing but transformers: no cache, no padding, no code of prefopt's."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)

    def one(prompt: str, response: str) -> tuple[float, int]:
        begins = tokenizer(prompt).input_ids
        answer = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*begins, *answer]])).logits[0, :-1].double()
        steps = logits.log_softmax(-1)[len(begins) - 1 :]
        return float(steps[torch.arange(len(answer)), torch.tensor(answer)].sum()), len(answer)

    found = np.array([[one(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows])
    return Plain(Sides(*found[:, :, 0].T), Sides(*found[:, :, 1].T))


def evaluation(
    name: str | Path,
    *data: str | Path,
    reference: str | Path | None = None,
    beta: float | None = None,
    overrides: Sequence[str] = (),
    dimensions: Sequence[str] = (),
    known: frozenset[bytes] | None = None,
) -> Evaluation:
    """What `prefopt eval` does before it writes."""
    target = find_target(
        str(name),
        Silent(),
        RunFinder(),
        reference=str(reference) if reference else None,
        beta=beta,
        overrides=overrides,
    )
    settings = chosen_sets(target.recipe.dataset, [*map(str, data)], split=None, dimensions=dimensions)
    return evaluate(target, held_out_sets(target, settings, Silent()), Silent(), trained=Trained(known))


def made_up(
    logps: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None = None,
    *,
    ranks: Sequence[Sequence[int]] | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    responses: Sequence[Sequence[Sequence[int]]] | None = None,
    prompts: Sequence[int] | None = None,
    ids: Sequence[str] | None = None,
    reward: Reward | None = None,
    dropped: dict[str, int] | None = None,
    whole: Sequence[Sequence[int]] | None = None,
    fingerprint: str = "ab12",
) -> ScoredSet:
    """A set of these rows; each row lists its responses, the best first.

    Args:
        logps, reference: nats under the policy and under its reference.
        ranks: of the responses; by default 0, 1, 2, ...
        lengths: in tokens, by default 5 each; `responses` says which tokens.
        prompts: number of each row's prompt; by default each its own.
        ids: of the rows.
        whole: ranks of the rows as they were read, where responses were left out since.
    """
    ranks = ranks or [list(range(len(row))) for row in logps]
    fresh = itertools.count(10)
    lengths = lengths or [[5] * len(row) for row in logps]
    responses = responses or [[[next(fresh)] * length for length in row] for row in lengths]
    prompts = prompts or range(len(logps))
    ids = ids or [f"row-{number}" for number in range(len(logps))]
    rows = Dataset.from_dict(
        {
            "row_id": list(ids),
            "prompt_ids": [[1, number] for number in prompts],
            "response_ids": [[list(one) for one in row] for row in responses],
            "ranks": [list(row) for row in ranks],
        }
    )
    texts = {
        name: Comparison(
            name, "made-up", f"prompt {number}", tuple(f"{name}, {n}" for n in range(len(row))), tuple(row)
        )
        for name, number, row in zip(ids, prompts, whole or ranks, strict=True)
    }
    held_out = HeldOutSet("made-up", rows, texts, fingerprint, dropped or {}, (2,))
    return scored_set(held_out, logps, reference, reward)
