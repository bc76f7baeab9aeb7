"""What is evaluated, from what it is measured, and what its reward is."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.targets import SETTLED, Reward, Target, find_target, require_effect
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent
from tests.training.conftest import (
    LORA,
    Run,
    shared_run,  # noqa: F401  (a fixture)
)

SHORT = "training.max_steps=1"


def found(name: str | Path, *overrides: str, runs: Path | None = None, **options: object) -> Target:
    return find_target(str(name), Silent(), RunFinder(runs), overrides=overrides, **options)  # type: ignore[arg-type]


def test_rewards_by_hand() -> None:
    logps, reference, tokens = np.array([-4.0, -9.0]), np.array([-5.0, -3.0]), np.array([2, 3])
    for scale, relative, per_token, expected, formula in (
        (0.1, True, False, [0.1, -0.6], "beta * (logp - reference's logp)"),
        (0.1, True, True, [0.05, -0.2], "beta * (logp - reference's logp) / tokens"),
        (2.0, False, False, [-8, -18], "beta * logp"),
        (2.0, False, True, [-4, -6], "beta * logp / tokens"),
    ):
        reward = Reward(scale, "beta", relative, per_token)
        np.testing.assert_allclose(reward.of(logps, reference, tokens), expected)
        assert reward.formula == formula
    with pytest.raises(ValueError, match="needs a reference"):
        Reward(1.0, "beta", relative=True, per_token=False).of(logps, None, tokens)


@pytest.mark.parametrize("name", SETTLED)
@pytest.mark.parametrize("rest", ["", ".deeper"])
def test_what_the_run_has_settled_is_not_overridden(name: str, rest: str) -> None:
    with pytest.raises(UserError, match=rf"the run has settled {name}{rest}, and is evaluated as it is"):
        require_effect(["dataset.max_length=64", f"{name}{rest}=1"])


def test_what_may_be_overridden() -> None:
    require_effect(
        ["dataset.max_length=64", "dataset.eval={a: b}", "training.use_cpu=true", "model.dtype=float32"]
    )


def test_a_run(shared_run: Run, tiny_world: Path) -> None:  # noqa: F811
    path = shared_run("run", SHORT, "method.beta=0.3", "method.length_normalize=true").run.path
    target = found(path, "dataset.max_length=99")
    assert target.reward == Reward(0.3, "beta", relative=True, per_token=True)
    assert target.reference is not None
    assert Path(target.reference.weights) == tiny_world / "model"
    assert target.recipe.dataset.max_length == 99
    assert target.run is not None
    assert target.to_dict()["run_id"] == target.run.read_manifest()["run_id"]
    assert target.to_dict()["method"]["beta"] == 0.3
    assert found(path, beta=0.7).reward == Reward(0.7, "beta", relative=True, per_token=True)
    # What only training needs is of no concern.
    assert "learning_rate" not in target.recipe.training
    assert target.recipe.training["use_cpu"]
    assert found(path, "training.optim=adamw_bnb_8bit").recipe.training == target.recipe.training
    alone = found(path, reference="none")
    assert (alone.reference, alone.reward) == (None, None)
    with pytest.raises(UserError, match=r"the run has settled method\.beta"):
        found(path, "method.beta=1")


def test_a_soft_run_has_a_reward_of_its_own(shared_run: Run) -> None:  # noqa: F811
    path = shared_run("soft", SHORT, "method={name: soft, alpha: 0.4, kl_coef: 0}").run.path
    own = Reward(0.4, "alpha", relative=False, per_token=False)
    assert found(path).reward == found(path, reference="none").reward == own
    assert found(path, beta=2.0).reward == Reward(2.0, "alpha", relative=False, per_token=False)
    assert found(path).reference is not None


def test_a_model_and_an_adapter(shared_run: Run, tiny_world: Path) -> None:  # noqa: F811
    model = found(tiny_world / "model")
    assert (model.reference, model.reward, model.run) == (None, None, None)
    assert (model.to_dict()["run"], model.to_dict()["method"]) == (None, None)
    path = shared_run("lora", SHORT, LORA).run.path
    adapter = found(path / "model", reference=str(tiny_world / "model"))
    assert adapter.source.adapter == path / "model"
    assert adapter.reward == Reward(0.1, "beta", relative=True, per_token=False)
    of_run = found(tiny_world / "model", reference=str(path), beta=0.5)
    assert of_run.reference is not None
    assert of_run.reference.adapter == path / "model"
    assert of_run.reward == Reward(0.5, "beta", relative=True, per_token=False)


def test_a_moved_run_is_found(shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = shared_run("run", SHORT, "method.beta=0.3", "method.length_normalize=true").run.path
    shutil.copytree(path, tmp_path / "deep" / "elsewhere")
    (tmp_path / "deep" / "elsewhere").rename(tmp_path / "deep" / "moved")
    target = found("runs/moved", runs=tmp_path)
    assert target.run is not None
    assert target.run.path == tmp_path / "deep" / "moved"


def test_a_reference_that_has_changed_is_refused(shared_run: Run, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    own = shutil.copytree(tiny_world / "model", tmp_path / "own")
    path = shared_run("changed", SHORT, f"model.name_or_path={own}").run.path
    shutil.rmtree(own)
    with pytest.raises(UserError, match=r"began with, .*own, is not there any more or has changed"):
        found(path)
    # Measured from something else, it is of no concern.
    assert found(path, reference="none").reward is None
    assert found(path, reference=str(tiny_world / "model")).reward is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/of/the/kind", r"RUN_OR_MODEL: there is no folder nothing/of/the/kind"),
        ("{file}", r"RUN_OR_MODEL: .*file is a file"),
        ("{empty}", r"RUN_OR_MODEL: the folder .*empty holds no model"),
    ],
)
def test_no_policy(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    named = name.format(file=tmp_path / "file", empty=tmp_path / "empty")
    with pytest.raises(UserError, match=message):
        found(named)
    with pytest.raises(UserError, match=message.replace("RUN_OR_MODEL", "--reference")):
        find_target("someone/model", Silent(), RunFinder(), reference=named)


def test_an_unfinished_run(shared_run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = shared_run("run", SHORT, "method.beta=0.3", "method.length_normalize=true").run.path
    copy = shutil.copytree(path, tmp_path / "copy")
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    with pytest.raises(UserError, match=r"copy has no finished policy \(its status is 'interrupted'\)"):
        found(copy)
