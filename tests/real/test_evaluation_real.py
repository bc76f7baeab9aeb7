"""Held-out human preferences under a pretrained model: what plain transformers and scipy find."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.evaluation.scored import ScoredSet
from tests.evaluation.plain import evaluation

pytestmark = pytest.mark.real

CLOSE = 1e-3
"""Nats."""
NEAR_TIE = 1e-4
"""Nats between both responses: below it rounding may decide."""
CONTEXT = 512
BATCH_TOKENS = 16_384


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def plain_logps(model: Any, sequences: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """(N,) nats of each (prompt, response), in padded batches of about equal lengths, float64 log-softmax."""
    found = np.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda n: sum(map(len, sequences[n])))
    while order:
        longest = sum(map(len, sequences[order[-1]]))
        size = max(1, BATCH_TOKENS // longest)
        batch, order = order[-size:], order[:-size]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        attended = torch.zeros_like(ids)
        for row, number in enumerate(batch):
            tokens = torch.tensor([*sequences[number][0], *sequences[number][1]])
            ids[row, : len(tokens)], attended[row, : len(tokens)] = tokens, 1
        with torch.no_grad():
            logits = model(ids, attention_mask=attended).logits[:, :-1].double()
        steps = logits.gather(2, ids[:, 1:, None])[:, :, 0] - logits.logsumexp(2)
        for row, number in enumerate(batch):
            prompt, response = map(len, sequences[number])
            found[number] = steps[row, prompt - 1 : prompt + response - 1].sum()
    return found


def tokens_of(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[list[int]]]]:
    """Every row's prompt and its two responses, tokenised together as a model meets them."""
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    sides = [
        tokenizer([row["prompt"] + row[side] for row in rows]).input_ids for side in ("chosen", "rejected")
    ]
    found = []
    for prompt, *both in zip(prompts, *sides, strict=True):
        assert all(each[: len(prompt)] == prompt for each in both)
        found.append((prompt, [[*each[len(prompt) :], tokenizer.eos_token_id] for each in both]))
    return found


@pytest.mark.slow
def test_every_pair_of_hh_is_what_plain_transformers_finds(shared: Path, stories: Path) -> None:
    """All pairs that fit, every log-probability, and the accuracy to the last pair; the others are counted."""
    path = shared / "data" / "hh_helpful_harmless.jsonl.gz"
    found = evaluation(stories, path).sets["hh_helpful_harmless"]
    rows = read(path)
    encoded = tokens_of(AutoTokenizer.from_pretrained(stories), rows)
    fitting = [(prompt, both) for prompt, both in encoded if len(prompt) + max(map(len, both)) <= CONTEXT]
    long = sum(len(prompt) >= CONTEXT for prompt, _ in encoded)
    dropped = found.to_dict()["dropped"]
    assert dropped == {"prompt too long": long, "response too long": len(rows) - len(fitting) - long}
    assert found.pairs + sum(dropped.values()) == len(rows) == 4642
    assert found.pairs == len(fitting)

    records = found.scored.records()
    assert [each["chosen_tokens"] for each in records] == [len(both[0]) for _, both in fitting]
    assert [each["rejected_tokens"] for each in records] == [len(both[1]) for _, both in fitting]
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    chosen, rejected = logps_of(model, fitting)
    np.testing.assert_allclose([each["chosen_logp"] for each in records], chosen, atol=CLOSE, rtol=0)
    np.testing.assert_allclose([each["rejected_logp"] for each in records], rejected, atol=CLOSE, rtol=0)
    same_accuracy(
        found.figures["accuracy/logp"].value, [each["margin"] for each in records], chosen - rejected
    )


def test_policy_and_reference(shared: Path, stories: Path, tmp_path: Path) -> None:
    """The first 600 rows under a policy that has gone astray, measured from where it was."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * weight.std() * torch.randn_like(weight))
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rows = read(shared / "data" / "hh_helpful_harmless.jsonl.gz")[:600]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluation(tmp_path / "policy", tmp_path / "first.jsonl", reference=stories, beta=0.5).sets[
        "first"
    ]
    encoded = tokens_of(tokenizer, rows)
    fitting = [(prompt, both) for prompt, both in encoded if len(prompt) + max(map(len, both)) <= CONTEXT]
    records = found.scored.records()
    assert len(records) == len(fitting) > 300
    own, its = logps_of(model, fitting), logps_of(reference, fitting)
    for name, logps in (("", own), ("reference_", its)):
        for side, expected in zip(("chosen", "rejected"), logps, strict=True):
            told = [each[f"{name}{side}_logp"] for each in records]
            np.testing.assert_allclose(told, expected, atol=CLOSE, rtol=0)
    margins = 0.5 * ((own[0] - its[0]) - (own[1] - its[1]))
    np.testing.assert_allclose([each["margin"] for each in records], margins, atol=CLOSE, rtol=0)
    same_accuracy(found.figures["accuracy/reward"].value, [each["margin"] for each in records], margins)
    same_accuracy(found.figures["reference/accuracy/logp"].value, its[0] - its[1], its[0] - its[1])
    before, after = its[0] > its[1], own[0] > own[1]
    assert found.figures["flipped"].value == pytest.approx((before != after).mean(), abs=1e-9)
    assert (before != after).any(), "nothing to find out"


def logps_of(model: Any, rows: list[tuple[list[int], list[list[int]]]]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) of chosen and (N,) of rejected."""
    found = plain_logps(model, [(prompt, side) for prompt, both in rows for side in both])
    return found[::2], found[1::2]


def same_accuracy(told: float, own: Any, margins: np.ndarray) -> None:
    """To the last pair, but for those that are so near a tie that rounding decides."""
    clear = abs(margins) > NEAR_TIE
    assert (~clear).sum() <= 3
    assert ((np.array(own) > 0) == (margins > 0))[clear].all()
    assert told == pytest.approx((margins > 0).mean(), abs=(~clear).mean() + 1e-12)


@pytest.mark.parametrize("name", ["pandalm_ranked", "qa_feedback_ranked"])
def test_lists_are_ranked_as_scipy_has_it(name: str, shared: Path, stories: Path) -> None:
    path = shared / "data" / f"{name}.jsonl.gz"
    found = evaluation(stories, path, reference=stories).sets[name]
    assert found.ranking is not None
    assert "reward" not in found.ranking.kendall_tau  # the model is its own reference
    scored = found.scored
    rows = lists(scored)
    assert found.ranking.rows == len(rows) > 50
    assert found.ranking.responses == sum(len(ranks) for ranks, _ in rows.values())
    for score in ("logp", "logp_per_token"):
        taus, hits = [], []
        for ranks, values in rows.values():
            own = np.array([values[place][score] for place in sorted(values)])
            taus.append(kendalltau(own, -np.array(ranks)).statistic)
            hits.append(np.mean(np.array(ranks)[own == own.max()] == 0))
        assert found.ranking.kendall_tau[score].value == pytest.approx(np.nanmean(taus), abs=1e-12)
        assert found.ranking.best_of_n[score].value == pytest.approx(np.mean(hits), abs=1e-12)
    chance = np.mean([np.mean(np.array(ranks) == 0) for ranks, _ in rows.values()])
    assert found.ranking.chance == pytest.approx(chance)
    # What was read: every row, less those that were dropped.
    assert len(read(path)) == len(scored.prompts) + sum(scored.held_out.dropped.values())


def lists(scored: ScoredSet) -> dict[str, tuple[list[int], dict[int, dict[str, float]]]]:
    """By id, of rows with more than two responses: their ranks, and the responses' scores as `pairs.jsonl` has them."""
    ranks = {row["row_id"]: row["ranks"] for row in scored.held_out.tokens if len(row["ranks"]) > 2}
    found: dict[str, tuple[list[int], dict[int, dict[str, float]]]] = {
        name: (listed, {}) for name, listed in ranks.items()
    }
    for record in scored.records():
        if record["id"] in found:
            for place, side in zip(record["responses"], ("chosen", "rejected"), strict=True):
                logp, tokens = record[f"{side}_logp"], record[f"{side}_tokens"]
                found[record["id"]][1][place] = {"logp": logp, "logp_per_token": logp / tokens}
    return found
