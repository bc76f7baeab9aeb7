"""What `docs/soft.md` says of the sandbox, in half the steps: towards softmax(r / alpha), alpha, the KL on samples."""

from pathlib import Path

import pytest

from prefopt_cli.recipe import load_recipe
from prefopt_cli.sandbox.bench import Score
from prefopt_cli.sandbox.plan import ScoreSettings
from prefopt_cli.sandbox.score import score
from prefopt_cli.sandbox.world import World
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

SETTINGS = ScoreSettings(prompts=100, per_prompt=4, exact_prompts=4)

RUNS = {
    "free": ("method.kl_coef=0",),
    "sharp": ("method.kl_coef=0", "method.alpha=0.5"),
    "held": ("method.kl_coef=1",),
    "ranked": ("method.kl_coef=0", "dataset.train.0.config=ranked", "training.num_train_epochs=2"),
}


@pytest.fixture(scope="module")
def scores(sandbox: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Score]:
    """The base policy's and every run's, with the distance to softmax(r / 1)."""
    folder = tmp_path_factory.mktemp("soft")
    for name, overrides in RUNS.items():
        quick = (
            "dataset.eval={}",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.max_steps=40",
        )
        recipe = load_recipe(
            REPOSITORY / "recipes" / "soft-sandbox.yaml", [*quick, *overrides, f"output_dir={folder / name}"]
        )
        train(recipe, recipe_folder=Path(), reporter=Silent())
    report = score([str(folder / name) for name in RUNS], target="softmax:1", settings=SETTINGS)
    return {"base": report.opponent, **{Path(each.name).name: each for each in report.policies}}


def value(scores: dict[str, Score], name: str, figure: str) -> float:
    return scores[name].figures[figure].value


@pytest.mark.parametrize("name", ["free", "ranked"])
def test_without_kl_it_approaches_the_softmax_of_the_reward(scores: dict[str, Score], name: str) -> None:
    assert value(scores, name, "total_variation") < 0.6 * value(scores, "base", "total_variation")


def test_lower_alpha_is_sharper_and_wins_more(scores: dict[str, Score]) -> None:
    assert (
        value(scores, "sharp", "entropy")
        < value(scores, "free", "entropy")
        < value(scores, "base", "entropy")
    )
    assert scores["free"].win_rates["helpful"].low > 0.5


def test_the_kl_on_samples_holds_the_policy_near_the_base(scores: dict[str, Score]) -> None:
    assert value(scores, "held", "kl") < 0.5 * value(scores, "free", "kl")
    assert value(scores, "held", "entropy") > value(scores, "free", "entropy")
