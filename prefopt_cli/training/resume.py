"""Going on with a run: only with the recipe and the data that it began with."""

import json
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.recipe import diff_recipes, load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import CHECKPOINT_MARK, RunFolder
from prefopt_cli.training.trainer import PreferenceTrainer

MAY_CHANGE = {"output_dir"} | {  # a moved run folder is still the same run
    f"training.{name}"
    for name in (
        "logging_steps",
        "logging_first_step",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "per_device_eval_batch_size",
        "dataloader_num_workers",
        "report_to",
        "run_name",
        "project",
    )
}
"""What does not touch the weights, so a resumed run may set it differently."""


def require_resumable(run: RunFolder, recipe: Recipe) -> None:
    """Refuse to go on with a run that began with another recipe.

    Raises:
        UserError: there is no run, or the recipe differs from the run's in something that matters.
    """
    if not run.is_run():
        raise UserError(f"There is no run in {run.path} to resume. Start it without --resume.")
    changed = [key for key in diff_recipes(load_recipe(run.recipe), recipe) if key not in MAY_CHANGE]
    if changed:
        raise UserError(
            f"The run in {run.path} began with another recipe ({', '.join(changed)} differ), so going on would mix "
            f"two runs. Use its own recipe ({run.recipe}), or start a new run in another output_dir."
        )


def require_same_data(run: RunFolder, fingerprints: dict[str, str]) -> None:
    """Refuse to go on when the data is no longer what the run began with.

    Raises:
        UserError: the tokenised data of a set differs.
    """
    before = run.read_manifest().get("data", {})
    changed = sorted(name for name in {*before, *fingerprints} if before.get(name) != fingerprints.get(name))
    if changed:
        raise UserError(
            f"The data of {', '.join(changed)} has changed since the run in {run.path} began (or the tokenizer "
            "has), so the run cannot be resumed. Restore it, or start a new run in another output_dir."
        )


def restore_progress(trainer: PreferenceTrainer, checkpoint: Path) -> None:
    """Give the trainer back what the checkpoint's mark holds (token count, sums of the open logging window)."""
    trainer.load_progress_state(json.loads((checkpoint / CHECKPOINT_MARK).read_text(encoding="utf-8")))
