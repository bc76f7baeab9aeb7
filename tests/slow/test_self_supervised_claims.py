"""What `docs/self-supervised.md` says of the sandbox, in half the steps: degrees are told, the policy still wins."""

from pathlib import Path

import pytest

from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs import metrics
from prefopt_cli.sandbox.plan import ScoreSettings
from prefopt_cli.sandbox.score import score
from prefopt_cli.sandbox.world import World
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import Outcome, train
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcome(sandbox: World, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("degrees")
    options = ["training.save_strategy=no", "training.max_steps=40", f"output_dir={folder / 'run'}"]
    recipe = load_recipe(REPOSITORY / "recipes" / "self-supervised-sandbox.yaml", options)
    return train(recipe, recipe_folder=Path(), reporter=Silent())


def test_levels_of_held_out_replies_are_told(outcome: Outcome) -> None:
    counts = outcome.run.read_manifest()["receipt"]["sets"]["heldout"]["degrees"]["levels"]
    commonest = max(counts.values()) / sum(counts.values())
    last = metrics.read(outcome.run.metrics)[-1]
    assert last["eval_heldout_ssl/accuracy"] > commonest + 0.1


def test_the_policy_wins_against_the_base(outcome: Outcome) -> None:
    settings = ScoreSettings(prompts=100, per_prompt=4, exact_prompts=0)
    (policy,) = score([str(outcome.run.path)], settings=settings).policies
    assert policy.win_rates["helpful"].low > 0.5
