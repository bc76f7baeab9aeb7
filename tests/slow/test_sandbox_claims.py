"""What the sandbox promises: the shipped recipe works, every GPO loss works, and beta does what it should.

The policies are trained as `prefopt train` would and judged by the gold reward on held-out prompts.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import GPO_LOSSES
from prefopt_cli.sandbox.bench import Score
from prefopt_cli.sandbox.plan import ScoreSettings
from prefopt_cli.sandbox.score import score
from prefopt_cli.sandbox.world import World
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

RECIPE = REPOSITORY / "recipes" / "gpo-sandbox.yaml"
SETTINGS = ScoreSettings(prompts=100, per_prompt=4, exact_prompts=0)

LOSSES = {
    "logistic": 0.5,
    "hinge": 0.5,
    "squared": 1.0,
    "exponential": 1.0,
    "truncated_quadratic": 1.0,
    "savage": 0.5,
}
"""Loss -> a beta at which it learns in 25 steps."""

SWEEP = (0.2, 1.0, 5.0)

Trained = Callable[..., str]


@pytest.fixture(scope="module")
def trained(sandbox: World, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train the shipped recipe with overrides, in half its batches and without evaluation; returns the run."""
    folder = tmp_path_factory.mktemp("claims")

    def start(name: str, *overrides: str) -> str:
        quick = (
            "dataset.eval={}",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.per_device_train_batch_size=32",
        )
        recipe = load_recipe(RECIPE, [*quick, *overrides, f"output_dir={folder / name}"])
        train(recipe, recipe_folder=folder, reporter=Silent())
        return str(folder / name)

    return start


def judged(runs: list[str]) -> list[Score]:
    """Their scores against the base policy."""
    return score(runs, settings=SETTINGS).policies


def test_the_shipped_recipe(sandbox: World, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [f"output_dir={tmp_path / 'run'}"])
    train(recipe, recipe_folder=RECIPE.parent, reporter=Silent())
    settings = ScoreSettings(prompts=150, per_prompt=4, exact_prompts=6)
    (found,) = score([str(tmp_path / "run")], settings=settings).policies
    assert found.changes["reward/helpful"].low > 0
    assert found.win_rates["helpful"].low > 0.75
    assert found.figures["well_formed"].value >= 0.85
    assert found.changes["total_variation"].high < 0
    assert found.changes["heldout/logp_accuracy"].low > 0


def test_every_loss_raises_the_gold_reward(trained: Trained) -> None:
    assert set(LOSSES) == set(GPO_LOSSES)
    runs = [
        trained(loss, f"method.loss={loss}", f"method.beta={beta}", "training.max_steps=25")
        for loss, beta in LOSSES.items()
    ]
    for loss, found in zip(LOSSES, judged(runs), strict=True):
        change = found.changes["reward/helpful"]
        assert change.low > 0.2, f"{loss}: {change}"
        assert found.figures["well_formed"].value > 0.9, loss


def test_a_larger_beta_stays_nearer_to_the_base_policy(trained: Trained) -> None:
    """KL falls from each beta to the next by more than its intervals; so does the win rate from the first to the last.

    The win rate flattens where it is high, so that between neighbours it is only asked to fall. With smaller betas or
    many more steps it does not: the policy leaves the well-formed replies (benchmarks/results/sandbox-gpo.md).
    """
    runs = [trained(f"beta-{beta:g}", f"method.beta={beta}", "training.max_steps=50") for beta in SWEEP]
    scores = judged(runs)
    for near, far in zip(scores[1:], scores, strict=False):
        assert near.figures["kl"].high < far.figures["kl"].low
        assert near.win_rates["helpful"].value < far.win_rates["helpful"].value
    assert scores[-1].win_rates["helpful"].high < scores[0].win_rates["helpful"].low
