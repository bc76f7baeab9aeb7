"""`prefopt eval` of small runs, held against plain transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.evaluate import Evaluation
from tests.evaluation.plain import Plain, by_hand, evaluation, load, read
from tests.tiny import build_model
from tests.training.conftest import (
    LORA,
    Run,
    shared_run,  # noqa: F401  (a fixture)
)

CLOSE = 1e-4
"""Nats, for sums of a few hundred float32 logarithms."""

Rewards = Callable[[np.ndarray, np.ndarray | None, np.ndarray], np.ndarray]


class Case(NamedTuple):
    """A policy to evaluate, and the same thing put together by hand."""

    name: Path
    policy: Any
    reference: Any
    reward: Rewards | None
    formula: str | None
    asked: dict[str, Any] | None = None


def relative(logps: np.ndarray, reference: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
    assert reference is not None
    return 0.1 * (logps - reference)


RELATIVE = "beta * (logp - reference's logp)"
SOFT = "method={name: soft, alpha: 0.5, kl_coef: 0}"


def case(kind: str, run: Run, world: Path) -> Case:
    """The run or model of a kind."""
    base = world / "model"

    def trained(name: str, *options: str) -> Path:
        return run(name, *options).run.path

    def sequential(first: Path) -> tuple[str, str]:
        method = f"{{name: sequential, previous: [{first}], lambdas: 0.5}}"
        return f"model.name_or_path={first}", f"method={method}"

    match kind:
        case "all weights":
            path = trained("full")
            return Case(path, load(path / "model"), load(base), relative, RELATIVE)
        case "lora":
            path = trained("lora", LORA)
            return Case(path, load(base, path / "model"), load(base), relative, RELATIVE)
        case "per token":
            path = trained("per-token", "method.length_normalize=true")
            return Case(
                path,
                load(path / "model"),
                load(base),
                lambda own, its, tokens: 0.1 * (own - its) / tokens,
                f"{RELATIVE} / tokens",
            )
        case "soft":
            path = trained("soft", SOFT)
            return Case(path, load(path / "model"), load(base), lambda own, *_: 0.5 * own, "alpha * logp")
        case "soft per token":
            path = trained("soft-token", SOFT, "method.length_normalize=true")
            reward = lambda own, _, tokens: 0.5 * own / tokens  # noqa: E731
            return Case(path, load(path / "model"), load(base), reward, "alpha * logp / tokens")
        case "self-supervised":
            path = trained(
                "degrees", "method={name: self_supervised, levels: 3, stopwords: en, align: {name: gpo}}"
            )
            return Case(path, load(path / "model"), load(base), relative, RELATIVE)
        case "second stage":
            first = trained("full")
            path = trained("second", *sequential(first), "dataset.train.0.limit=40")
            return Case(path, load(path / "model"), load(first / "model"), relative, RELATIVE)
        case "second stage, lora":
            first = trained("lora", LORA)
            path = trained("second-lora", LORA, *sequential(first))
            return Case(path, load(base, path / "model"), load(base, first / "model"), relative, RELATIVE)
        case "another reference":
            path, other = trained("full"), trained("lora", LORA)
            asked = {"reference": other, "beta": 0.25}
            reward = lambda own, its, _: 0.25 * (own - its)  # noqa: E731
            return Case(path, load(path / "model"), load(base, other / "model"), reward, RELATIVE, asked)
        case "no reference":
            path = trained("full")
            return Case(path, load(path / "model"), None, None, None, {"reference": "none"})
        case "soft, no reference":
            path = trained("soft", SOFT)
            reward = lambda own, *_: 0.5 * own  # noqa: E731
            return Case(path, load(path / "model"), None, reward, "alpha * logp", {"reference": "none"})
        case "a model":
            return Case(base, load(base), None, None, None)
        case "a model with a reference":
            path = trained("full") / "model"
            return Case(path, load(path), load(base), relative, RELATIVE, {"reference": base})
        case "an adapter folder":
            path = trained("lora", LORA) / "model"
            return Case(path, load(base, path), None, None, None)
    raise AssertionError(kind)


RUNS = (
    "all weights", "lora", "per token", "soft", "soft per token", "self-supervised", "second stage",
    "second stage, lora", "another reference", "no reference", "soft, no reference",
)  # fmt: skip
MODELS = ("a model", "a model with a reference", "an adapter folder")


@pytest.mark.parametrize("kind", [*RUNS, *MODELS])
def test_every_figure_is_what_plain_transformers_gives(
    kind: str,
    shared_run: Run,  # noqa: F811
    tiny_world: Path,
) -> None:
    asked = case(kind, shared_run, tiny_world)
    data = [f"heldout={tiny_world}/heldout.jsonl"] if kind in MODELS else []
    found = evaluation(asked.name, *data, **(asked.asked or {}))
    rows = read(tiny_world / "heldout.jsonl")
    own = by_hand(asked.policy, tiny_world / "model", rows)
    its = by_hand(asked.reference, tiny_world / "model", rows) if asked.reference else None
    expected = figures_by_hand(own, its, asked.reward, asked.formula)

    summary = found.to_dict()
    (held_out,) = summary["sets"].values()
    values = {name: each["value"] for name, each in held_out["figures"].items()}
    assert values == pytest.approx(expected, abs=CLOSE)
    assert all(each["low"] <= each["value"] <= each["high"] for each in held_out["figures"].values())
    assert (summary["reward"] or {}).get("formula") == asked.formula
    assert (summary["reference"] is None) == (asked.reference is None)
    assert held_out["main"] == ("reward" if asked.reward else "logp")
    assert (held_out["calibration"] is None) == (asked.reward is None)

    records = found.sets["heldout"].scored.records()
    assert len(records) == len(rows)
    for name, sides in (("", own), ("reference_", its)):
        for side in ("chosen", "rejected"):
            key = f"{name}{side}_logp"
            if sides is None:
                assert not any(key in each for each in records)
                continue
            np.testing.assert_allclose(
                [each[key] for each in records], getattr(sides.logps, side), atol=CLOSE
            )
    for side in ("chosen", "rejected"):
        assert [each[f"{side}_tokens"] for each in records] == getattr(own.tokens, side).tolist()
    margins = rewards_by_hand(own, its, asked.reward) if asked.reward else own.logps.margins
    np.testing.assert_allclose([each["margin"] for each in records], margins, atol=CLOSE)


def rewards_by_hand(own: Plain, its: Plain | None, reward: Rewards) -> np.ndarray:
    chosen, rejected = (
        reward(logps, its.logps[side] if its else None, own.tokens[side])
        for side, logps in enumerate(own.logps)
    )
    return chosen - rejected


def figures_by_hand(
    own: Plain, its: Plain | None, reward: Rewards | None, formula: str | None
) -> dict[str, float]:
    scores = {
        "logp": own.logps.margins,
        "logp_per_token": own.logps[0] / own.tokens[0] - own.logps[1] / own.tokens[1],
    }
    if reward is not None:
        scores["reward"] = rewards_by_hand(own, its, reward)
    if its is not None and formula != RELATIVE:
        scores["log_ratio"] = own.logps.margins - its.logps.margins
    found = {}
    for name, margins in scores.items():
        assert abs(margins).min() > CLOSE, "a tie that rounding could turn"
        found[f"accuracy/{name}"] = (margins > 0).mean()
        found[f"margin/{name}"] = margins.mean()
    for name, what in (("logp", own.logps), ("tokens", own.tokens)):
        found[f"{name}/chosen"], found[f"{name}/rejected"] = what.chosen.mean(), what.rejected.mean()
    if its is None:
        return found
    before, after = its.logps.margins > 0, own.logps.margins > 0
    return {
        **found,
        "change/chosen": (own.logps.chosen - its.logps.chosen).mean(),
        "change/rejected": (own.logps.rejected - its.logps.rejected).mean(),
        "reference/accuracy/logp": before.mean(),
        "reference/margin/logp": its.logps.margins.mean(),
        "gain/accuracy/logp": after.mean() - before.mean(),
        "gain/margin/logp": (own.logps.margins - its.logps.margins).mean(),
        "flipped": (before != after).mean(),
        "flipped/to_chosen": (after & ~before).mean(),
        "flipped/to_rejected": (before & ~after).mean(),
    }


def test_a_second_evaluation_computes_nothing(
    shared_run: Run,  # noqa: F811
    tiny_world: Path,
) -> None:
    """Each of 24 pairs' responses is scored once by policy and reference."""
    path = shared_run("once", "training.seed=5").run.path
    first = evaluation(path)
    assert (first.computed, first.cached) == (48, 48)  # training has scored the reference on its held-out set
    again = evaluation(path)
    assert (again.computed, again.cached) == (0, 96)
    assert comparable(again) == comparable(first)
    # Another file with the same words in other rows: nothing is new, either.
    elsewhere = tiny_world / "some.jsonl"
    elsewhere.write_text("\n".join((tiny_world / "heldout.jsonl").read_text().splitlines()[5:9]))
    assert (evaluation(path, elsewhere).computed, evaluation(path, elsewhere).cached) == (0, 16)


def comparable(found: Evaluation) -> dict[str, Any]:
    summary = found.to_dict()
    return {name: value for name, value in summary.items() if name not in ("made", "scores")}


def test_the_files(shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    found = evaluation(shared_run("full").run.path)
    folder = tmp_path / "new" / "folder"
    found.write(folder, title="a <b> title")
    assert {each.name for each in folder.iterdir()} == {"pairs.jsonl", "summary.json", "report.html"}
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert read(folder / "pairs.jsonl") == found.sets["heldout"].scored.records()
    page = (folder / "report.html").read_text()
    assert "a &lt;b&gt; title" in page
    assert "</html>" in page


def test_a_folder_that_cannot_be_written(shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    found = evaluation(shared_run("full").run.path)
    (tmp_path / "file").touch()
    with pytest.raises(PrefoptError, match=r"The evaluation cannot be written to .*file: "):
        found.write(tmp_path / "file", title="")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_policy_that_is_its_own_reference(tiny_world: Path, tmp_path: Path) -> None:
    """All rewards are equal: every accuracy by reward is a tie, and lists have no order to speak of."""
    ranked = tmp_path / "ranked.jsonl"
    lines = [
        {
            "prompt": row["prompt"],
            "responses": [row["chosen"], row["rejected"], f" {n}."],
            "ranking": [0, 1, 2],
        }
        for n, row in enumerate(read(tiny_world / "heldout.jsonl"))
    ]
    ranked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = tiny_world / "model"
    found = evaluation(model, ranked, reference=model).to_dict()
    held_out = found["sets"]["ranked"]
    assert held_out["figures"]["accuracy/reward"]["value"] == 0.5
    assert held_out["figures"]["flipped"]["value"] == held_out["figures"]["change/chosen"]["value"] == 0
    assert {"nothing_flipped", "like_reference", "at_chance"} <= {each["code"] for each in found["findings"]}
    assert held_out["ranking"]["best_of_n"]["reward"]["value"] == pytest.approx(1 / 3)
    assert "reward" not in held_out["ranking"]["kendall_tau"]
    assert "logp" in held_out["ranking"]["kendall_tau"]


def test_a_reference_with_other_tokens_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    build_model(other, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"The reference .*other has another tokenizer \(\d+ entries\) than"):
        evaluation(tiny_world / "model", tiny_world / "heldout.jsonl", reference=other)
