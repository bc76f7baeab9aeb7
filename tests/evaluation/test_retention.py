"""What every stage of a chain does to every dimension."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.heat_map import Panel, heat_map
from prefopt_cli.evaluation.merge_check import MergeSettings, merge_run
from prefopt_cli.evaluation.retention import retention
from prefopt_cli.evaluation.retention_table import BASE, HeldOut, Retention, Stage, table
from prefopt_cli.evaluation.statistics import Estimate
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Silent
from tests.tiny import pairs, write_pairs
from tests.training.conftest import (
    LORA,
    Run,
    make_recipe,  # noqa: F401  (a fixture, as is the next)
    run,  # noqa: F401
)

SHORT = "training.max_steps=2"
BRIEF = 10
"""Pairs of the held-out set `brief`, where the rude answer is preferred."""


@pytest.fixture
def sets(tiny_world: Path, tmp_path: Path) -> tuple[str, str]:
    """Held-out sets for both dimensions, and training data for the second, as overrides."""
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(BRIEF, 5)]
    write_pairs(tmp_path / "brief.jsonl", flipped)
    return (
        f"dataset.eval={{kind: {tiny_world}/heldout.jsonl, brief: {tmp_path}/brief.jsonl}}",
        f"dataset.train={tmp_path}/brief.jsonl",
    )


def sequential(*previous: Path, adapters: str = "continue") -> str:
    listed = ", ".join(map(str, previous))
    return f"method={{name: sequential, previous: [{listed}], lambdas: 0.5, adapter_per_stage: {adapters}}}"


def folder(found: object) -> RunFolder:
    return RunFolder(Path(str(found)))


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def deltas(model: torch.nn.Module, world: Path, rows: Sequence[dict[str, str]]) -> np.ndarray:
    """logp(chosen) - logp(rejected) with nothing but transformers: one response at a time, no cache, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")

    def logp(prompt: str, response: str) -> float:
        begins = tokenizer(prompt).input_ids
        ids = [*begins, *tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        steps = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return float(steps[len(begins) - 1 :].sum())

    return np.array(
        [logp(row["prompt"], row["chosen"]) - logp(row["prompt"], row["rejected"]) for row in rows]
    )


def test_a_chain_with_one_adapter_by_hand(
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    """Every figure is what plain transformers and peft give, and a second look computes nothing."""
    held_out, brief = sets
    run("kind", LORA, held_out)
    start = f"model.name_or_path={tmp_path}/kind"
    run("second", LORA, held_out, brief, start, sequential(tmp_path / "kind"), "dimension=brief")
    last = folder(tmp_path / "second")
    found = retention(last, Silent())

    base = AutoModelForCausalLM.from_pretrained(tiny_world / "model").eval()
    rows = {"kind": read(tiny_world / "heldout.jsonl"), "brief": read(tmp_path / "brief.jsonl")}
    own = {name: [deltas(base, tiny_world, listed)] for name, listed in rows.items()}
    for stage in ("kind", "second"):
        policy = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_world / "model"), str(tmp_path / stage / "model")
        ).eval()
        for name, listed in rows.items():
            own[name].append(deltas(policy, tiny_world, listed))
    assert found.stages == (BASE, "kind", "brief")
    assert found.sets == ("kind", "brief")
    assert {name: each.pairs for name, each in found.held_out.items()} == {"kind": 24, "brief": BRIEF}
    for name, measured in own.items():
        for stage, delta in zip(found.stages, measured, strict=True):
            cell, rho = found.cells[stage, name], delta - measured[0]
            assert cell.margin.value == pytest.approx(rho.mean(), abs=1e-4)
            assert cell.logp_accuracy.value == pytest.approx((delta > 0).mean())
            if stage != BASE:
                assert cell.accuracy.value == pytest.approx((rho > 0).mean())
                assert cell.margin.low < cell.margin.value < cell.margin.high
    assert found.cells[BASE, "kind"].accuracy == (0.5, 0.5, 0.5)
    # The second stage prefers what the first one learnt to avoid.
    kind = own["kind"]
    assert found.changes.keys() == {"kind"}
    assert found.changes["kind"].margin.value == pytest.approx((kind[2] - kind[1]).mean(), abs=1e-4)
    assert found.changes["kind"].margin.high < 0
    accuracy = ((kind[2] > kind[0]).mean()) - ((kind[1] > kind[0]).mean())
    assert found.changes["kind"].accuracy.value == pytest.approx(accuracy)
    assert found.computed > 0

    again = retention(last, Silent())
    assert again.computed == 0
    assert again.cells == found.cells


@pytest.mark.parametrize(
    "way", ["a new adapter each", "all weights", "self-supervised", "from a merged model"]
)
def test_every_kind_of_chain(
    way: str,
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tmp_path: Path,
) -> None:
    """The second stage's margins, less those of the first, are what the second logged while it trained."""
    held_out, brief = sets
    adapter = [] if way == "all weights" else [LORA]
    run("kind", *adapter, held_out)
    start, method = tmp_path / "kind", sequential(tmp_path / "kind")
    if way == "a new adapter each":
        method = sequential(tmp_path / "kind", adapters="new")
    elif way == "self-supervised":
        method = (
            "method={name: self_supervised, levels: 3, stopwords: en, align: "
            f"{method.removeprefix('method=')}}}"
        )
    elif way == "from a merged model":
        start = tmp_path / "merged"
        merge_run(str(tmp_path / "kind"), start, MergeSettings(), Silent())
    second = run("brief", *adapter, held_out, brief, f"model.name_or_path={start}", method)
    found = retention(folder(tmp_path / "brief"), Silent())
    assert found.stages == (BASE, "kind", "brief")
    assert [stage.run for stage in found.chain[1:]] == [str(tmp_path / "kind"), str(tmp_path / "brief")]
    # What it logged is relative to the first stage, and the table to the base.
    beta, logged = 0.1, second.metrics
    for name in found.sets:
        gained = found.cells["brief", name].margin.value - found.cells["kind", name].margin.value
        assert beta * gained == pytest.approx(logged[f"eval_{name}_rewards/margins"], abs=1e-4)


def test_one_stage_has_nothing_to_forget(
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tmp_path: Path,
) -> None:
    run("kind", SHORT, sets[0])
    found = retention(folder(tmp_path / "kind"), Silent())
    assert found.stages == (BASE, "kind")
    assert not found.changes


def test_data_by_override_and_a_holdout(
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    """A run without held-out sets can be told some; training data is read for a holdout alone."""
    run("kind", SHORT, "dataset.eval={}")
    last = folder(tmp_path / "kind")
    with pytest.raises(
        UserError, match=r"kind has no held-out sets\. Add one for each dimension: dataset\.eval"
    ):
        retention(last, Silent())
    given = [f"dataset.eval={{kind: {tiny_world}/heldout.jsonl}}", "dataset.train=gone.jsonl"]
    assert retention(last, Silent(), overrides=given).sets == ("kind",)
    assert retention(last, Silent(), overrides=["dataset.holdout=0.25"]).sets == ("holdout",)
    # Whatever else training needs, such as an optimizer's package, is of no concern to scores.
    assert retention(last, Silent(), overrides=[*given, "training.optim=adamw_bnb_8bit"]).computed == 0


def test_changed_and_moved_stages(
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tmp_path: Path,
) -> None:
    held_out, brief = sets
    run("kind", SHORT, held_out)
    run("second", SHORT, held_out, brief, f"model.name_or_path={tmp_path}/kind")
    second = folder(tmp_path / "second")
    before = retention(second, Silent())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kind").rename(tmp_path / "elsewhere" / "kind")
    with pytest.raises(UserError, match=r"an ancestor of .*second: there is no run in .*kind"):
        retention(second, Silent())
    moved = retention(second, Silent(), RunFinder(tmp_path / "elsewhere"))
    assert moved.cells == before.cells
    run("kind", SHORT, held_out, "training.seed=7")
    with pytest.raises(UserError, match=r"kind holds another run than the one that is meant"):
        retention(second, Silent())


def test_a_base_that_has_changed_is_refused(
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model")
    model.save_pretrained(own)
    AutoTokenizer.from_pretrained(tiny_world / "model").save_pretrained(own)
    run("kind", SHORT, sets[0], f"model.name_or_path={own}")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(own)
    refusal = r"The policy that .*kind began with, .*own, is not there any more or has changed"
    with pytest.raises(UserError, match=refusal):
        retention(folder(tmp_path / "kind"), Silent())


def test_a_changed_policy_is_refused(
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tmp_path: Path,
) -> None:
    run("kind", SHORT, sets[0])
    run("second", SHORT, *sets, f"model.name_or_path={tmp_path}/kind")
    weights = tmp_path / "kind" / "model"
    model = AutoModelForCausalLM.from_pretrained(weights)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(weights)
    with pytest.raises(
        UserError, match=r"The policy of .*kind has changed since .*second was trained from it"
    ):
        retention(folder(tmp_path / "second"), Silent())


CHAIN = (Stage(BASE), Stage("a", "a", "runs/a", "1"), Stage("b", "b", "runs/b", "2"))


def made_up() -> Retention:
    """Two pairs of one prompt and one of another; the sets are named after the dimensions."""
    of_sets = {
        "a": [np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, 4.0]), np.array([0.0, -1.0, 4.0])],
        "b": [np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0]), np.array([3.0, 2.0, 0.0])],
    }
    cells, changes = table(CHAIN, of_sets, {"a": [0, 0, 1], "b": [0, 0, 1]})
    held_out = {name: HeldOut(3, 2, "ab12") for name in of_sets}
    return Retention(CHAIN, held_out, cells, changes, 7)


def test_the_table_by_hand() -> None:
    found = made_up()
    cell = found.cells["b", "a"]
    assert cell.accuracy.value == pytest.approx(0.5)  # a tie counts one half
    assert cell.margin.value == 1.0
    # Two prompts: resampling draws both, or one of them twice.
    assert (cell.margin.low, cell.margin.high) == (-0.5, 4.0)
    assert found.cells["a", "b"].accuracy.value == 0.5
    assert found.cells["a", "b"].logp_accuracy.value == 1.0
    change = found.changes["a"]
    assert (change.since, change.until) == ("a", "b")
    assert change.margin.value == -1.0
    assert (change.margin.low, change.margin.high) == (-1.5, 0.0)
    assert change.accuracy.value == pytest.approx(-0.5)
    assert "b" not in found.changes  # trained last


def test_a_dimension_trained_twice_counts_from_the_second_time() -> None:
    chain = (*CHAIN, Stage("a (3)", "a", "runs/c", "3"), Stage("d", "d", "runs/d", "4"))
    of_policies = [np.array([float(n), 2.0 * n]) for n in range(5)]
    _, changes = table(chain, {"a": of_policies}, {"a": [0, 1]})
    assert (changes["a"].since, changes["a"].until) == ("a (3)", "d")
    assert changes["a"].margin.value == 1.5


def test_files(tmp_path: Path) -> None:
    found = made_up()
    found.write(tmp_path / "new" / "folder")
    written = tmp_path / "new" / "folder"
    assert {file.name for file in written.iterdir()} == {
        "retention.json",
        "retention.csv",
        "retention.png",
    }
    assert json.loads((written / "retention.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert (written / "retention.png").read_bytes().startswith(b"\x89PNG")
    with (written / "retention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3 + 2  # stages, sets and measures; both changes
    assert {row["measure"] for row in rows} == {
        "accuracy",
        "margin",
        "logp_accuracy",
        "accuracy_change_since_a",
        "margin_change_since_a",
    }
    row = next(r for r in rows if (r["stage"], r["dimension"], r["measure"]) == ("b", "a", "margin"))
    assert [float(row[name]) for name in ("value", "low", "high", "pairs")] == [1.0, -0.5, 4.0, 3.0]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrefoptError, match=r"retention table cannot be written to .*file"):
        made_up().write(tmp_path / "file")


def test_a_base_in_a_relative_folder_is_found_from_elsewhere(
    run: Run,  # noqa: F811
    sets: tuple[str, str],
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_world)
    run("kind", SHORT, sets[0], "model.name_or_path=model")
    monkeypatch.chdir(tmp_path)
    assert retention(RunFolder(Path("kind")), Silent()).stages == (BASE, "kind")


def test_what_the_runs_have_settled_is_not_overridden() -> None:
    with pytest.raises(UserError, match=r"the run has settled method\.beta"):
        retention(folder("gone"), Silent(), overrides=["dataset.max_length=64", "method.beta=1"])


def test_names_are_no_formulas_and_leave_room_for_the_figures() -> None:
    panel = Panel("accuracy", [[Estimate(0.5, 0.4, 0.6)]])
    plain = heat_map([panel], ["kind"], ["kind"], centres=[0.5])
    assert plain.startswith(b"\x89PNG")
    heat_map([panel], ["a$x^$"], ["$_$"], centres=[0.5])
    long, longer = (heat_map([panel], ["n" * size], ["n" * size], centres=[0.5]) for size in (60, 600))
    read = matplotlib.image.imread
    assert read(io.BytesIO(long)).shape == read(io.BytesIO(longer)).shape
