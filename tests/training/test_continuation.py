"""A run folder as the starting policy: training goes on from it, and it is the reference, adapter included."""

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.runs import metrics
from tests.training.conftest import LORA, Run

EVALUATE = "training.eval_on_start=true"


@pytest.mark.parametrize("first", ["adapter=none", LORA], ids=["after full", "after adapter"])
@pytest.mark.parametrize("second", ["adapter=none", LORA], ids=["full", "adapter"])
def test_starts_from_the_runs_policy_and_measures_against_it(run: Run, first: str, second: str) -> None:
    earlier = run("earlier", first)
    later = run("later", second, f"model.name_or_path={earlier.run.path}", EVALUATE)
    start = metrics.read(later.run.metrics)[0]
    for name in ("logps/chosen", "logps/rejected", "entropy"):
        assert start[f"eval_heldout_{name}"] == pytest.approx(
            earlier.metrics[f"eval_heldout_{name}"], rel=1e-5
        )
    # Only a reference equal to that policy gives no margin at all.
    assert start["eval_heldout_gpo/squared_log_ratio"] == pytest.approx(0.0, abs=1e-7)
    assert later.metrics["eval_heldout_gpo/squared_log_ratio"] > 1e-3
    lineage = later.run.read_manifest()["lineage"]
    assert str(earlier.run.path) in lineage["reference"]
    assert lineage["ancestors"][0]["run_id"] == earlier.run.read_manifest()["run_id"]


def test_the_base_alone_is_a_different_policy(run: Run) -> None:
    """Were the base the reference by mistake, the test above would see a margin."""
    earlier = run("earlier", LORA, "training.max_steps=20")
    base = run("base", EVALUATE, "training.max_steps=1")
    start = metrics.read(base.run.metrics)[0]
    assert abs(start["eval_heldout_logps/chosen"] - earlier.metrics["eval_heldout_logps/chosen"]) > 0.1


def test_another_adapter_is_refused(run: Run) -> None:
    earlier = run("earlier", LORA, "training.max_steps=1")
    with pytest.raises(UserError, match=r"r is 4, not 8"):
        run("later", "adapter={type: lora, r: 8, lora_alpha: 8}", f"model.name_or_path={earlier.run.path}")


def test_what_the_recipe_leaves_out_of_an_adapter_is_as_it_was(run: Run) -> None:
    earlier = run("earlier", LORA, "training.max_steps=1")
    start = f"model.name_or_path={earlier.run.path}"
    assert run("later", "adapter={type: lora}", start, "training.max_steps=1").status == "finished"
    with pytest.raises(UserError, match=r"lora_dropout is 0.1, not 0.0"):
        run("other", "adapter={type: lora, lora_dropout: 0.0}", start)
    with pytest.raises(UserError, match=r"target_modules"):
        run("other", "adapter={type: lora, target_modules: [q_proj]}", start)


def test_the_policy_a_run_comes_from_is_not_overwritten(run: Run) -> None:
    earlier = run("earlier", "training.max_steps=1").run
    for place in (earlier.path, earlier.model):
        with pytest.raises(UserError, match="which the run reads"):
            run("earlier", f"model.name_or_path={place}", overwrite=True)
    assert (earlier.model / "model.safetensors").is_file()


def test_unfinished_run_is_refused(run: Run) -> None:
    earlier = run("earlier", "training.max_steps=1").run
    earlier.model.rename(earlier.path / "elsewhere")
    earlier.update_manifest(status="interrupted")
    with pytest.raises(UserError, match=r"no finished policy.*interrupted"):
        run("later", f"model.name_or_path={earlier.path}")
