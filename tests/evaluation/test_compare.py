"""Several policies on the same held-out pairs."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation import compare_files
from prefopt_cli.evaluation.compare import Comparison, compare, find_targets
from prefopt_cli.evaluation.held_out import chosen_sets
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent
from tests.evaluation.plain import evaluation, read
from tests.tiny import pairs, write_pairs
from tests.training.conftest import (
    LORA,
    Run,
    shared_run,  # noqa: F401  (a fixture)
)


class Told(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def compared(
    *names: Path | str,
    data: Path | None = None,
    reference: str | None = None,
    kl_prompts: int = 0,
    told: Told | None = None,
) -> Comparison:
    """What `prefopt compare` does before it writes."""
    reporter = told or Told()
    targets, skipped = find_targets(
        [*map(str, names)], reporter, RunFinder(), reference=reference, beta=None, overrides=[]
    )
    listed = [str(data)] if data else []
    settings = chosen_sets(targets[0].recipe.dataset, listed, split=None, dimensions=[])
    return compare(targets, settings, reporter, RunFinder(), skipped=skipped, kl_prompts=kl_prompts)


@pytest.fixture
def three(shared_run: Run) -> tuple[Path, Path, Path]:  # noqa: F811
    """Runs that went different ways from the same model."""
    return (
        shared_run("one").run.path,
        shared_run("two", "training.learning_rate=2.0e-3", "training.seed=3").run.path,
        shared_run("three", "method={name: soft, alpha: 0.5, kl_coef: 0}").run.path,
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs of which every third one is the wrong way round, so that policies differ in both directions."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if n % 3 == 0 else row
        for n, row in enumerate(pairs(60, seed=31))
    ]
    write_pairs(path, rows)
    return path


def records(found: Any) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in found.records()}


def test_differences_are_those_of_the_single_evaluations(three: tuple[Path, Path, Path], mixed: Path) -> None:
    told = Told()
    found = compared(*three, data=mixed, told=told)
    singles = [evaluation(path, mixed) for path in three]
    paired = found.sets["mixed"]
    assert list(paired.scored) == ["one", "two", "three"]
    assert paired.left_out == 0
    own = [records(each.sets["mixed"].scored) for each in singles]
    for label, single, listed in zip(paired.scored, singles, own, strict=True):
        assert records(paired.scored[label]) == listed
        alone = single.sets["mixed"].figures
        for name, each in paired.figures[label].items():
            assert each.value == pytest.approx(alone[name].value)
    assert sum("Log-probabilities under the reference" in each for each in told.messages) == 1
    assert sum("Log-probabilities under the policy" in each for each in told.messages) == 3

    margins = {
        label: np.array([each["margin"] for each in listed.values()])
        for label, listed in zip(paired.scored, own, strict=True)
    }
    for label in ("two", "three"):
        difference = paired.differences[label]
        right = (margins[label] > 0).astype(float) - (margins["one"] > 0)
        assert difference["accuracy/main"].estimate.value == pytest.approx(right.mean())
        # One of the rewards is alpha log pi, so margins are compared in nats.
        assert "margin/main" not in difference
        nats = [
            np.array([each["chosen_logp"] - each["rejected_logp"] for each in listed.values()])
            for listed in (own[["one", "two", "three"].index(label)], own[0])
        ]
        assert difference["margin/logp"].estimate.value == pytest.approx((nats[0] - nats[1]).mean())
        changed = {
            (name, "chosen" if listed[name]["margin"] > 0 else "rejected")
            for listed in [own[["one", "two", "three"].index(label)]]
            for name in listed
            if listed[name]["margin"] * own[0][name]["margin"] < 0
        }
        changes = paired.change_records(label, str)
        assert {(each["id"], each["to"]) for each in changes} == changed
        assert len(changes) == len(changed)
        for each in difference.values():
            assert 0 < each.p <= each.p_holm <= 1
    assert any(paired.changes.values()), "nothing changed: the test says nothing"


def test_files_and_summary(three: tuple[Path, Path, Path], mixed: Path, tmp_path: Path) -> None:
    found = compared(*three, data=mixed)
    folder = tmp_path / "new" / "folder"
    compare_files.write(found, folder)
    summary = compare_files.summary_of(found)
    assert {each.name for each in folder.iterdir()} == {
        "summary.json",
        "compare.csv",
        "changes.jsonl",
        "report.html",
    }
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert [each["label"] for each in summary["policies"]] == ["one", "two", "three"]
    assert summary["baseline"] == str(three[0])
    first, *others = (each["sets"]["mixed"] for each in summary["policies"])
    assert first["differences"] is first["changed"] is None
    changes = read(folder / "changes.jsonl")
    by_id = {f"mixed.jsonl:{n}": row for n, row in enumerate(read(mixed), 1)}
    for label, each in zip(("two", "three"), others, strict=True):
        own = [change for change in changes if change["policy"] == label]
        for side in ("chosen", "rejected"):
            assert each["changed"][f"to_{side}"] == sum(change["to"] == side for change in own)
    texts = {(row["prompt"], row["chosen"], row["rejected"]) for row in by_id.values()}
    for change in changes:
        assert (change["prompt"], change["chosen"], change["rejected"]) in texts
    with (folder / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    line = next(
        each
        for each in rows
        if (each["policy"], each["measure"]) == (str(three[1]), "difference/accuracy/main")
    )
    told = others[0]["differences"]["accuracy/main"]
    for name in ("value", "low", "high", "p", "p_holm"):
        assert float(line[name]) == pytest.approx(told[name], rel=1e-6)
    assert "</html>" in (folder / "report.html").read_text()
    (tmp_path / "file").touch()
    with pytest.raises(PrefoptError, match=r"The comparison cannot be written to .*file: "):
        compare_files.write(found, tmp_path / "file")


def test_the_same_run_twice(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(three[0], tmp_path / "copy")
    found = compared(three[0], copy)
    for each in found.sets["heldout"].differences["copy"].values():
        assert each.estimate == (0, 0, 0)
        assert (each.p, each.p_holm) == (1.0, 1.0)
    assert found.sets["heldout"].changes["copy"] == ()
    codes = [each.code for each in compare_files.comparison_findings(found)]
    assert sorted(codes) == ["few_prompts", "like_baseline"]


def test_a_model_and_its_reference_are_asked_once(
    three: tuple[Path, Path, Path],
    tiny_world: Path,
    shared_run: Run,  # noqa: F811
) -> None:
    told = Told()
    lora = shared_run("lora", LORA).run.path
    found = compared(tiny_world / "model", three[0], lora, data=tiny_world / "heldout.jsonl", told=told)
    references = [each for each in told.messages if "Log-probabilities under the reference" in each]
    assert references
    assert all("48 responses, all from the cache" in each for each in references)
    assert compare_files.summary_of(found)["policies"][0]["reward"] is None


def test_the_kl_and_its_picture(three: tuple[Path, Path, Path], shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    still = shared_run("still", "training.learning_rate=0", "training.max_steps=1").run.path
    found = compared(three[0], still, kl_prompts=3)
    moved, same = (each.kl for each in found.policies)
    assert moved is not None
    assert moved.value != 0
    assert same == (0, 0, 0)
    compare_files.write(found, tmp_path / "a")
    assert (tmp_path / "a" / "kl.png").read_bytes().startswith(b"\x89PNG")
    compare_files.write(found, tmp_path / "b", plot=tmp_path / "own.svg")
    assert not (tmp_path / "b" / "kl.png").exists()
    assert "<svg" in (tmp_path / "own.svg").read_text()
    assert compare_files.summary_of(found)["kl"]["prompts"] == 3
    without = compared(three[0], still)
    assert [each.kl for each in without.policies] == [None, None]
    assert compare_files.summary_of(without)["kl"] is None


def test_policies_of_different_contexts(tiny_world: Path, tmp_path: Path) -> None:
    """The first holds 256 tokens, the second 40: longer rows are left out of both, and counted."""
    small = shutil.copytree(tiny_world / "model", tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    data = tiny_world / "heldout.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")

    def tokens(*texts: str) -> int:
        return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts) + 2

    rows = read(data)
    fits = [all(tokens(row["prompt"], row[side]) <= 40 for side in ("chosen", "rejected")) for row in rows]
    assert 2 < sum(fits) < len(fits) - 2
    for names in ((tiny_world / "model", small), (small, tiny_world / "model")):
        found = compared(*names, data=data).sets["heldout"]
        assert found.left_out == len(fits) - sum(fits)
        assert len(found.first.chosen) == sum(fits)
        assert found.differences[names[1].name]["margin/main"].estimate == pytest.approx((0, 0, 0), abs=1e-4)


def test_policies_of_different_tokenizers(tiny_world: Path, tmp_path: Path) -> None:
    """One of them knows some words as one token: every pair is compared, each in its own tokens."""
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    tokenizer.add_tokens([" number", " happy to help"])
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    data = tiny_world / "heldout.jsonl"
    found = compared(tiny_world / "model", other, data=data).sets["heldout"]
    assert found.left_out == 0
    singles = [evaluation(name, data).sets["heldout"].scored for name in (tiny_world / "model", other)]
    assert [records(each) for each in found.scored.values()] == [records(each) for each in singles]
    lengths = [each.tokens.sum() for each in singles]
    assert lengths[0] > lengths[1]


def test_what_is_no_policy_is_left_out_and_told(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("a", "b", "unfinished"):
        shutil.copytree(three[0], folder / name)
    manifest = folder / "unfinished" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    (folder / "notes.txt").touch()
    (folder / "empty").mkdir()
    names = sorted(folder.iterdir())
    found = compared(*names)
    assert [each.label for each in found.policies] == ["a", "b"]
    skipped = {Path(each.name).name: each.reason for each in found.skipped}
    assert skipped == {
        "empty": "neither a run nor a model",
        "notes.txt": "a file",
        "unfinished": "not finished (status interrupted)",
    }
    assert [each["reason"] for each in compare_files.summary_of(found)["skipped"]] == [
        each.reason for each in found.skipped
    ]
    with pytest.raises(UserError, match=r"RUN: there is no folder .*gone"):
        compared(*names, folder / "gone" / "gone")
    with pytest.raises(
        UserError, match=r"Two policies at least .* there is only one\.\n .*unfinished: not finished"
    ):
        compared(folder / "a", folder / "unfinished", f"{folder}/a/")
    with pytest.raises(UserError, match=r"there is none\."):
        compared(folder / "empty")


def test_references_that_differ_are_told(three: tuple[Path, Path, Path], shared_run: Run) -> None:  # noqa: F811
    second = shared_run("second", f"model.name_or_path={three[0]}", "training.max_steps=2").run.path
    found = compared(three[0], second)
    codes = [each.code for each in compare_files.comparison_findings(found)]
    assert "different_references" in codes
    told = compare_files.summary_of(found)["policies"]
    assert told[1]["reference"] == told[0]["reference"].replace(told[0]["reference"], told[1]["reference"])
    one = compared(
        three[0],
        second,
        reference=str(shared_run("two", "training.learning_rate=2.0e-3", "training.seed=3").run.path),
    )
    assert "different_references" not in [each.code for each in compare_files.comparison_findings(one)]


def test_gold_rewards_are_those_of_the_run_folders(three: tuple[Path, Path, Path]) -> None:
    folder = three[0] / "eval" / "sandbox"
    folder.mkdir(parents=True)
    figures = {"reward/helpful": {"value": 0.5, "low": 0.4, "high": 0.6}}
    (folder / "summary.json").write_text(json.dumps({"policies": {"runs/one": {"figures": figures}}}))
    try:
        found = compared(*three[:2])
    finally:
        shutil.rmtree(three[0] / "eval")
    assert [each.gold for each in found.policies] == [{"helpful": (0.5, 0.4, 0.6)}, None]
    told = [each["gold"] for each in compare_files.summary_of(found)["policies"]]
    assert told == [{"helpful": figures["reward/helpful"]}, None]


def test_prompts_that_one_of_them_was_trained_on(
    three: tuple[Path, Path, Path],
    shared_run: Run,  # noqa: F811
    mixed: Path,
) -> None:
    """Told of that policy alone: what it knows by heart is no better accuracy."""
    knows = shared_run("knows", f"dataset.train={mixed}").run.path
    found = compared(three[0], knows, data=mixed)
    (overlap,) = [each for each in compare_files.comparison_findings(found) if each.code == "train_overlap"]
    assert overlap.text.startswith(
        "knows: 60 of the 60 prompts (60 pairs, 100.0%) occur in the training data"
    )
    told = {each["label"]: each["sets"]["mixed"] for each in compare_files.summary_of(found)["policies"]}
    assert told["one"]["train_overlap"] == {"prompts": 0, "pairs": 0}
    assert told["knows"]["train_overlap"] == {"prompts": 60, "pairs": 60}


def test_rewards_of_other_scales_are_told(three: tuple[Path, Path, Path], mixed: Path) -> None:
    findings = {each.code: each for each in compare_files.comparison_findings(compared(*three, data=mixed))}
    assert (
        "alpha * logp, alpha = 0.5; beta * (logp - reference's logp), beta = 0.1"
        in findings["different_rewards"].text
    )
    alike = compare_files.comparison_findings(compared(*three[:2], data=mixed))
    assert "different_rewards" not in {each.code for each in alike}
