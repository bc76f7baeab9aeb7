"""Which prompts a policy was trained on, so that held-out sets that hold some of them are told."""

from prefopt_cli import data
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.held_out import prompt_key
from prefopt_cli.models.ancestry import line_of
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Reporter


def trained_on(
    run: RunFolder | None, runs: RunFinder, reporter: Reporter
) -> tuple[frozenset[bytes] | None, str]:
    """Digests of the prompts that a run and the runs before it were trained on.

    Returns:
        the digests (None where they cannot be known), and why they are not.
    """
    if run is None:
        return None, "no run tells what the model was trained on"
    found: set[bytes] = set()
    try:
        for each in line_of(run, runs):
            found |= _prompts(load_recipe(each.recipe), reporter)
    except UserError as error:
        return None, f"the training data cannot be read any more: {error}"
    return frozenset(found), ""


def _prompts(recipe: Recipe, reporter: Reporter) -> set[bytes]:
    settings = recipe.dataset.model_copy(update={"eval": {}})
    return {prompt_key(row) for row in data.load(settings, progress=reporter.progress).train}
