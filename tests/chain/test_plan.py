"""What a chain would do: by content, and with its reasons."""

import shutil
from pathlib import Path

import pytest

from prefopt_cli.chain.loader import load_chain
from prefopt_cli.chain.plan import make_plan
from prefopt_cli.errors import UserError
from prefopt_cli.recipe import dump_recipe, load_recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Silent
from tests.chain.conftest import Chains
from tests.tiny import pairs, write_pairs

SKIPPED = ["skip", "skip"]


def test_nothing_is_there_yet(chains: Chains) -> None:
    plan = chains.plan(counts_scores=True)
    assert [step.action for step in plan.steps] == ["train", "train"]
    assert not chains.out.exists()
    first, second = plan.steps
    assert str(chains.world / "model") in first.reference
    assert "stage tone" in second.reference
    assert [each.policy for each in second.scores or ()] == ["base", "tone"]
    base, tone = second.scores or ()
    assert base.responses is not None
    assert (tone.responses, tone.cached) == (None, None)


def test_a_finished_chain_is_skipped_and_nothing_is_written(trained: Chains) -> None:
    before = trained.files()
    plan = trained.plan(counts_scores=True)
    assert [step.action for step in plan.steps] == SKIPPED
    assert trained.files() == before


@pytest.mark.parametrize(
    ("override", "reasons"),
    [
        ("stages.1.lambdas.tone=0.3", [None, "method.lambdas.tone is 0.3 and was 0.5"]),
        ("stages.1.lambdas=0.3", [None, "method.lambdas.tone is 0.3 and was 0.5"]),
        ("stages.1.training.learning_rate=0.02", [None, "training.learning_rate is 0.02 and was 0.01"]),
        ("stages.1.method.beta=0.2", [None, "method.beta is 0.2 and was 0.1"]),
        (
            "stages.0.method.beta=0.2",
            ["method.beta is 0.2 and was 0.1", "stage tone before it is trained anew"],
        ),
        ("stages.1.training.max_grad_norm=2.0", [None, "training.max_grad_norm is 2.0 and was not set"]),
        ("stages.0.dataset.train.limit=9", ["the data of train has changed", "trained anew"]),
    ],
)
def test_a_change_trains_its_stage_and_all_after_it(
    trained: Chains, override: str, reasons: list[str | None]
) -> None:
    for step, reason in zip(trained.plan(override).steps, reasons, strict=True):
        assert step.action == ("retrain" if reason else "skip")
        assert reason is None or reason in step.reason


@pytest.mark.parametrize(
    "override",
    [
        "stages.1.lambdas=0.5",  # the same, in other words
        "training.logging_steps=3",  # does not touch the weights
        "training.eval_strategy=epoch",  # nor does this
        "training.save_strategy=no",
        "training.seed=42",  # the default, written out
        "stages.1.dataset.train.where={dimension: [facts]}",  # the same rows
        "dataset.eval.tone.limit=4",  # nor do held-out sets
    ],
)
def test_what_leaves_the_weights_as_they_are_trains_nothing(trained: Chains, override: str) -> None:
    assert trained.actions(override) == SKIPPED


BEST = (
    "training.load_best_model_at_end=true",
    "training.eval_strategy=steps",
    "training.eval_steps=1",
    "training.metric_for_best_model=tone_loss",
)


@pytest.mark.parametrize("change", ["dataset.eval.tone.limit=4", "training.eval_delay=1"])
def test_what_chooses_the_checkpoint_to_end_with_counts(finished: Chains, change: str) -> None:
    for name in ("tone", "facts"):
        run = RunFolder(finished.out / name)
        run.recipe.write_text(dump_recipe(load_recipe(run.recipe, BEST)))
    assert finished.actions(*BEST) == SKIPPED
    assert finished.actions(*BEST, change) == ["retrain", "retrain"]


def test_another_kind_of_method_is_told_by_its_name(finished: Chains) -> None:
    kind = "stages.1.method={name: self_supervised, align: {loss: logistic, beta: 0.1}}"
    finished.file.write_text(finished.file.read_text().replace("method: {loss: logistic, beta: 0.1}\n", ""))
    reasons = finished.reasons("stages.0.method={loss: logistic, beta: 0.1}", kind)
    assert reasons[1].startswith("method.name is 'self_supervised' and was 'sequential'")
    assert "align" not in reasons[1]


def test_stages_in_another_order(trained: Chains) -> None:
    text = trained.file.read_text()
    first, second = text.index("  - dimension: tone"), text.index("  - dimension: facts")
    lambdas = "    lambdas: {tone: 0.5}\n"
    turned = text[:first] + text[second:].replace(lambdas, "") + text[first:second]
    other = trained.folder / "turned.yaml"
    other.write_text(turned + lambdas.replace("tone", "facts"))
    plan = make_plan(load_chain(other), reporter=Silent(), runs=RunFinder())
    facts, tone = plan.steps
    assert (facts.action, tone.action) == ("retrain", "retrain")
    assert facts.reason.startswith("it was not the first stage; it was trained from another policy than")
    assert tone.reason == "it was the first stage; stage facts before it is trained anew"


def test_the_cache_holds_the_scores_of_a_stage_that_is_trained_anew(trained: Chains) -> None:
    second = trained.plan("stages.1.lambdas.tone=0.3", counts_scores=True).steps[1]
    assert [each.policy for each in second.scores or ()] == ["base", "tone"]
    assert all(each.responses and each.cached == each.responses for each in second.scores or ())


def test_the_same_data_in_another_file_is_the_same(trained: Chains, tmp_path: Path) -> None:
    shutil.copy(trained.world / "pairs.jsonl", tmp_path / "renamed.jsonl")
    moved = f"dataset.train.source={tmp_path}/renamed.jsonl"
    assert trained.actions(f"stages.0.{moved}", f"stages.1.{moved}") == SKIPPED
    write_pairs(tmp_path / "renamed.jsonl", pairs(96, seed=5))
    reason = trained.reasons(f"stages.1.{moved}")[1]
    assert "the data of train has changed" in reason


def test_overwrite_trains_all_anew(trained: Chains) -> None:
    plan = trained.plan(overwrite=True)
    assert [step.action for step in plan.steps] == ["retrain", "retrain"]
    assert "--overwrite" in plan.steps[0].reason


def test_a_changed_starting_policy_is_noticed(finished: Chains, tmp_path: Path) -> None:
    from tests.tiny import build_model

    build_model(tmp_path / "other", seed=3)
    reasons = finished.reasons(f"model.name_or_path={tmp_path}/other")
    assert "another policy than" in reasons[0]


def test_a_chain_whose_folder_was_moved_is_still_finished(finished: Chains, tmp_path: Path) -> None:
    finished.out.rename(tmp_path / "elsewhere")
    moved = f"output_dir={tmp_path}/elsewhere"
    assert finished.actions(moved) == SKIPPED
    outcome = finished.run(moved, "dataset.eval.tone.limit=15", runs_dir=tmp_path / "elsewhere")
    assert (outcome.status, outcome.last) == ("finished", None)


def test_a_stage_that_was_trained_anew_by_hand_is_noticed(finished: Chains) -> None:
    run = RunFolder(finished.out / "tone")
    run.update_manifest(run_id="another")
    plan = finished.plan()
    assert [step.action for step in plan.steps] == ["skip", "retrain"]
    assert "another policy than that of stage tone" in plan.steps[1].reason


def test_a_policy_that_was_changed_since_is_noticed(finished: Chains) -> None:
    weights = finished.out / "tone" / "model" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    plan = finished.plan()
    assert [step.action for step in plan.steps] == ["retrain", "retrain"]
    assert (
        plan.steps[0].reason
        == f"its policy ({finished.out / 'tone' / 'model'}) has changed since it was trained"
    )
    assert plan.steps[1].reason == "stage tone before it is trained anew"


def archived(chains: Chains, name: str) -> Path:
    """A run of the chain, moved into another folder, which is returned, and renamed."""
    folder = chains.folder / "archive"
    folder.mkdir()
    (chains.out / name).rename(folder / "renamed")
    return folder


def test_an_earlier_run_that_is_gone_is_refused(finished: Chains) -> None:
    archived(finished, "tone")
    with pytest.raises(UserError, match=r"stage 1, tone: later stages were trained from its run.*--runs-dir"):
        finished.plan()
    with pytest.raises(UserError, match="nor below"):
        finished.plan(runs_dir=finished.out)
    assert finished.actions(overwrite=True) == ["train", "retrain"]


def test_a_moved_run_is_found_again(finished: Chains) -> None:
    folder = archived(finished, "tone")
    plan = finished.plan(runs_dir=folder)
    assert [step.action for step in plan.steps] == SKIPPED
    assert plan.steps[0].run.path == folder / "renamed"
    assert f"found in {folder / 'renamed'}" in plan.steps[0].reason
    changed = finished.plan("stages.1.lambdas.tone=1", runs_dir=folder).steps[1]
    assert changed.recipe.model.name_or_path == str(folder / "renamed")
    assert changed.recipe.method.model_dump()["previous"] == [str(folder / "renamed")]


def test_a_moved_run_that_does_not_fit_any_more_stays_where_it_is(finished: Chains) -> None:
    folder = archived(finished, "tone")
    first = finished.plan("stages.0.method.beta=0.2", runs_dir=folder).steps[0]
    assert (first.action, first.run.path) == ("retrain", finished.out / "tone")


def test_the_last_run_is_found_by_the_chains_own_record(finished: Chains) -> None:
    folder = archived(finished, "facts")
    assert finished.actions() == ["skip", "train"]
    assert "is not in" in finished.reasons()[1]
    assert "--runs-dir" in finished.reasons()[1]
    assert finished.actions(runs_dir=folder) == SKIPPED


def test_an_unfinished_stage_goes_on(finished: Chains) -> None:
    run = RunFolder(finished.out / "facts")
    run.update_manifest(status="interrupted")
    shutil.rmtree(run.model)
    plan = finished.plan()
    assert [step.action for step in plan.steps] == ["skip", "resume"]
    assert "there is a checkpoint of step 3" in plan.steps[1].reason
    changed = finished.plan("dataset.eval.tone.limit=4").steps[1]
    assert (changed.action, "the data of tone has changed" in changed.reason) == ("retrain", True)


def test_a_run_that_another_process_holds_is_left_alone(finished: Chains) -> None:
    with (
        RunFolder(finished.out / "facts").held(),
        pytest.raises(UserError, match=r"stage 2, facts: Another process is training"),
    ):
        finished.plan("stages.1.lambdas.tone=0.3")


def test_what_is_no_run_is_never_replaced(chains: Chains) -> None:
    (chains.out / "facts").mkdir(parents=True)
    (chains.out / "facts" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run folder"):
        chains.plan(overwrite=True)


def test_a_run_that_the_chain_did_not_make_is_used_but_not_replaced(finished: Chains) -> None:
    (finished.out / "chain.json").unlink()
    assert finished.actions() == SKIPPED
    change = "stages.1.lambdas.tone=0.3"
    with pytest.raises(
        UserError, match=r"facts holds a run that this chain did not make.*lambdas\.tone is 0\.3"
    ):
        finished.plan(change)
    assert finished.actions(change, overwrite=True) == ["retrain", "retrain"]


@pytest.mark.parametrize("content", ["{", "[]", '{"stages": null}', '{"stages": ["tone"]}'])
def test_a_damaged_record_is_none(finished: Chains, content: str) -> None:
    (finished.out / "chain.json").write_text(content)
    assert finished.actions() == SKIPPED


def test_a_run_is_no_folder_for_a_chain(finished: Chains) -> None:
    with pytest.raises(UserError, match="is a run of `prefopt train`"):
        finished.plan(f"output_dir={finished.out}/tone")


def test_a_later_stage_whose_rows_are_all_gone_is_refused_at_once(chains: Chains) -> None:
    with pytest.raises(UserError, match=r"stage 2, facts: .*"):
        chains.plan("stages.1.dataset.train.where={dimension: none}")
    assert not chains.out.exists()


def test_a_later_stage_whose_function_is_missing_is_refused_at_once(chains: Chains) -> None:
    with pytest.raises(UserError, match=r"stage 2, facts: method.loss: there is no module 'mine'"):
        chains.plan("stages.1.method.loss=mine:f")


def test_a_changed_function_is_noticed(finished: Chains) -> None:
    run = RunFolder(finished.out / "facts")
    method = run.read_manifest()["method"]
    run.update_manifest(method={**method, "f": {**method["f"], "slope_at_zero": -7.0}})
    assert "the function logistic has changed" in finished.reasons()[1]
