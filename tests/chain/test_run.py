"""Chains that are trained."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation import retention as retention_module
from prefopt_cli.evaluation.retention_table import table
from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train
from tests.chain.conftest import Chains
from tests.training.conftest import LORA


class Telling(Silent):
    """Keeps what is said, and may send this process a signal at a step of one of the stages."""

    def __init__(self, stage: int = 0, step: int = 0) -> None:
        self.said: list[str] = []
        self._stage, self._step = stage, step

    def message(self, text: str) -> None:
        self.said.append(text)

    def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
        stages = sum(text.startswith("Stage ") for text in self.said)
        if metrics is None and (stages, step) == (self._stage, self._step):
            os.kill(os.getpid(), signal.SIGINT)


def test_two_stages_are_those_that_train_would_make(trained: Chains, tmp_path: Path) -> None:
    assert json.loads((trained.out / "chain.json").read_text())["status"] == "finished"
    manifest = RunFolder(trained.out / "facts").read_manifest()
    (ancestor,) = manifest["lineage"]["ancestors"]
    first = RunFolder(trained.out / "tone").read_manifest()
    assert (ancestor["run_id"], ancestor["dimension"]) == (first["run_id"], "tone")
    recipe = load_recipe(trained.out / "facts" / "recipe.yaml", [f"output_dir={tmp_path}/facts"])
    by_hand = train(recipe, recipe_folder=tmp_path, reporter=Silent())
    ours, theirs = (
        load_file(run / "model" / "model.safetensors") for run in (trained.out / "facts", by_hand.run.path)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_retention_table_has_every_stage_and_dimension(trained: Chains) -> None:
    assert (trained.out / "retention.png").is_file()
    with (trained.out / "retention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["stage"] for row in rows} == {"base", "tone", "facts"}
    assert {row["dimension"] for row in rows} == {"tone", "facts"}


def test_the_chain_that_is_kept_is_the_one_that_was_asked_for(trained: Chains) -> None:
    from prefopt_cli.chain.loader import load_chain

    kept, asked = load_chain(trained.out / "chain.yaml"), trained.load()
    assert [stage.recipe for stage in kept.stages] == [stage.recipe for stage in asked.stages]


def test_a_rerun_trains_nothing_and_keeps_the_table(finished: Chains) -> None:
    runs = {name: RunFolder(finished.out / name).read_manifest()["run_id"] for name in ("tone", "facts")}
    table = (finished.out / "retention.json").stat().st_mtime_ns
    outcome = finished.run()
    assert (outcome.status, outcome.last) == ("finished", None)
    assert {name: RunFolder(finished.out / name).read_manifest()["run_id"] for name in runs} == runs
    assert (finished.out / "retention.json").stat().st_mtime_ns == table


def test_changed_held_out_sets_make_the_table_anew_without_training(finished: Chains) -> None:
    outcome = finished.run("dataset.eval.tone.limit=15")
    assert outcome.last is None
    table = json.loads((finished.out / "retention.json").read_text())
    assert table["sets"]["tone"]["pairs"] < 15
    assert finished.run("dataset.eval.tone.limit=15").to_dict()["retention"] == table


def test_a_signal_while_the_table_is_computed(chains: Chains) -> None:
    class InTable(Silent):
        def progress(self, task: str, done: int, total: int) -> None:
            if task == "scoring with the policy tone":
                os.kill(os.getpid(), signal.SIGTERM)

    other_policy = "training.seed=77"  # whose scores no other test has left in the cache
    stopped = chains.run(other_policy, reporter=InTable())
    assert (stopped.status, stopped.signal) == ("interrupted", signal.SIGTERM)
    record = json.loads((chains.out / "chain.json").read_text())
    assert (record["status"], record["stages"][0]["status"]) == ("interrupted", "finished")
    assert chains.run(other_policy).status == "finished"
    assert [step.action for step in chains.plan(other_policy).steps] == ["skip", "skip"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_last_policy_that_was_changed_is_trained_anew(finished: Chains, file: str) -> None:
    path = finished.out / "facts" / "model" / file
    text = path.read_bytes()
    path.write_bytes(
        text.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-02')
        if file == "config.json"
        else text[:-1] + b"x"
    )
    assert path.read_bytes() != text
    first, last = finished.plan().steps
    assert (first.action, last.action) == ("skip", "retrain")
    assert last.reason.startswith("its policy (")
    assert last.reason.endswith("has changed since it was trained")


def test_an_interrupted_chain_goes_on_where_it_was(chains: Chains, trained: Chains, tmp_path: Path) -> None:
    stopped = chains.run(reporter=Telling(stage=2, step=2))
    assert (stopped.status, stopped.signal) == ("interrupted", signal.SIGINT)
    record = json.loads((chains.out / "chain.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished", "interrupted"]
    moved = tmp_path / "moved.jsonl"  # the same data in another place is still the same
    moved.write_bytes((chains.world / "pairs.jsonl").read_bytes())
    reporter = Telling()
    done = chains.run(f"stages.1.dataset.train.source={moved}", reporter=reporter)
    assert done.status == "finished"
    told = [text.partition(", because")[0] for text in reporter.said if text.startswith("Stage ")]
    assert told == ["Stage 1 of 2, tone: skip", "Stage 2 of 2, facts: resume"]
    assert any("Resuming from" in text for text in reporter.said)
    ours, straight = (load_file(each.out / "facts/model/model.safetensors") for each in (chains, trained))
    assert all(ours[name].equal(straight[name]) for name in straight)


def test_a_chain_that_was_interrupted_in_its_first_stage(chains: Chains) -> None:
    assert chains.run(reporter=Telling(stage=1, step=1)).status == "interrupted"
    record = json.loads((chains.out / "chain.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["interrupted", "waiting"]
    assert chains.actions() == ["resume", "train"]


def test_a_signal_after_the_last_step_of_a_stage_ends_the_chain(chains: Chains) -> None:
    stopped = chains.run(reporter=Telling(stage=1, step=3))
    assert (stopped.status, stopped.signal) == ("interrupted", signal.SIGINT)
    assert chains.actions() == ["skip", "train"]


def test_a_signal_after_the_last_scores_of_a_table_ends_the_chain(
    chains: Chains, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing asks whether to stop while the intervals are computed."""

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return table(*arguments, **options)

    monkeypatch.setattr(retention_module, "table", interrupted)
    stopped = chains.run()
    assert (stopped.status, stopped.signal) == ("interrupted", signal.SIGINT)
    assert chains.actions() == ["skip", "train"]
    assert (chains.out / "retention.json").is_file(), "what was computed is kept"


def test_a_changed_lambda_trains_the_last_stage_alone(finished: Chains) -> None:
    before = RunFolder(finished.out / "tone").read_manifest()["run_id"]
    other = RunFolder(finished.out / "facts").read_manifest()["run_id"]
    outcome = finished.run("stages.1.lambdas.tone=0")
    assert outcome.status == "finished"
    assert RunFolder(finished.out / "tone").read_manifest()["run_id"] == before
    manifest = RunFolder(finished.out / "facts").read_manifest()
    assert manifest["run_id"] != other
    assert manifest["method"]["lambdas"] == {"tone": 0}


def test_a_stage_after_a_moved_run(finished: Chains, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (finished.out / "tone").rename(tmp_path / "archive" / "first")
    outcome = finished.run("stages.1.lambdas.tone=0.7", runs_dir=tmp_path / "archive")
    assert outcome.status == "finished"
    assert not (finished.out / "tone").exists()
    (ancestor,) = RunFolder(finished.out / "facts").read_manifest()["lineage"]["ancestors"]
    assert ancestor["run"] == str(tmp_path / "archive" / "first")
    assert finished.actions("stages.1.lambdas.tone=0.7") == ["skip", "skip"]  # its place is known now


def test_a_chain_of_adapters(chains: Chains) -> None:
    assert chains.run(LORA).status == "finished"
    plan = chains.plan(LORA, "stages.1.lambdas=0", counts_scores=True)
    assert [step.action for step in plan.steps] == ["skip", "retrain"]
    assert all(each.responses == each.cached for each in plan.steps[1].scores or ())
    assert chains.run(LORA, "method.adapter_per_stage=new").status == "finished"


def test_a_new_adapter_of_another_shape_after_a_run_of_adapters(chains: Chains, tmp_path: Path) -> None:
    adapter = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    chains.run(LORA)
    again = [LORA, f"model.name_or_path={chains.out / 'facts'}", f"output_dir={tmp_path / 'later'}"]
    stacked = ["stages.1.method.adapter_per_stage=new", f"stages.1.adapter={json.dumps(adapter)}"]
    assert chains.run(*again, *stacked).status == "finished"
    adapter["target_modules"] = ["nix"]
    with pytest.raises(UserError, match=r"stage 2, facts: adapter.target_modules: the model has no module"):
        chains.plan(*again, stacked[0], f"stages.1.adapter={json.dumps(adapter)}")


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_damaged_table_is_made_anew(finished: Chains, content: str) -> None:
    (finished.out / "retention.json").write_text(content)
    table = finished.run().to_dict()["retention"]
    assert table is not None
    assert table == json.loads((finished.out / "retention.json").read_text())


def test_what_fails_is_recorded(chains: Chains) -> None:
    class Full(Telling):
        def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
            raise PrefoptError("the disk is full")

    with pytest.raises(PrefoptError, match="the disk is full"):
        chains.run(reporter=Full())
    record = json.loads((chains.out / "chain.json").read_text())
    assert record["status"] == "failed"
    assert [stage["status"] for stage in record["stages"]] == ["failed", "waiting"]


def test_a_later_stage_that_cannot_be_trained_leaves_nothing_behind(chains: Chains) -> None:
    with pytest.raises(UserError, match="stage 2, facts"):
        chains.run("stages.1.dataset.train.source=missing.jsonl")
    assert not chains.out.exists()
