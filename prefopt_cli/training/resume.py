"""Going on with a run: only with the recipe and the data that it began with."""

import json
import socket
import time
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.launch.meeting import SEEN_WITHIN
from prefopt_cli.recipe import diff_recipes, load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import CHECKPOINT_MARK, RunFolder
from prefopt_cli.training.trainer import PreferenceTrainer

SPLITS = {"training.per_device_train_batch_size", "training.gradient_accumulation_steps"}
"""How a step's rows are shared out; with as many rows in all, the steps are the same up to rounding."""

MAY_CHANGE = {"output_dir"} | {  # a moved run folder is still the same run
    f"training.{name}"
    for name in (
        "logging_steps",
        "logging_first_step",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "per_device_eval_batch_size",
        "precompute_ref_batch_size",
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
    changed = [
        key
        for key in diff_recipes(load_recipe(run.recipe), recipe)
        if key not in MAY_CHANGE | _splits(recipe) and not key.startswith("launch")
    ]
    if changed:
        raise UserError(
            f"The run in {run.path} began with another recipe ({', '.join(changed)} differ), so going on would mix "
            f"two runs. Use its own recipe ({run.recipe}), or start a new run in another output_dir."
        )


def _splits(recipe: Recipe) -> set[str]:
    """Those that may change: weights mu are relative to the rows that go through the policy together."""
    return SPLITS if getattr(recipe.method.alignment, "mu", "none") == "none" else set()


def require_same_start(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Refuse to go on when something that the run began with is another now.

    Args:
        run: the run to go on with.
        manifest: the manifest that a new run would begin with here and now.

    Raises:
        UserError: the data, the starting policy, the user's own f, the engine or the rows of a step differ.
    """
    before = run.read_manifest()
    where = f"the run in {run.path} began"
    remedy = "Restore it, or start a new run in another output_dir."
    data, data_before = manifest["data"], before.get("data", {})
    changed = sorted(name for name in {*data_before, *data} if data_before.get(name) != data.get(name))
    if changed:
        raise UserError(
            f"The data of {', '.join(changed)} has changed since {where} (or the tokenizer has). {remedy}"
        )
    if manifest["lineage"]["fingerprint"] != before["lineage"]["fingerprint"]:
        raise UserError(
            f"The policy {manifest['lineage']['policy']} has changed since {where} from it, and with it the "
            f"reference. {remedy}"
        )
    method = manifest["method"]
    if method.get("f") != before["method"].get("f"):
        loss = method.get("align", method)["loss"]
        raise UserError(f"The function {loss} has changed since {where}. {remedy}")
    _require_same_steps(run, before, manifest)


def _require_same_steps(run: RunFolder, before: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Each checkpoint of an engine that shards has the parts of its processes; DDP's are whole.

    Raises:
        UserError: the engine differs, the processes of one that shards do, or the rows of a step do.
    """
    engines = before.get("engine", "ddp"), manifest["engine"]
    processes = before["processes"], manifest["processes"]
    if engines[0] != engines[1]:
        raise UserError(
            f"The run in {run.path} began with launch.engine: {engines[0]}, whose checkpoints {engines[1]} cannot "
            f"read. Go on with engine: {engines[0]}."
        )
    if engines[0] != "ddp" and processes[0] != processes[1]:
        raise UserError(
            f"{processes[1]} process(es) cannot go on with the checkpoints that {processes[0]} wrote together with "
            f"launch.engine: {engines[0]}. Start {processes[0]}."
        )
    # Runs of earlier versions do not say how many rows a step had.
    rows = before.get("rows_per_step"), manifest["rows_per_step"]
    same = rows[0] == rows[1] if rows[0] else processes[0] == processes[1]
    if not same:
        raise UserError(
            f"{processes[1]} process(es) with the recipe's batches train on {rows[1]} rows in a step, and the run in "
            f"{run.path} began with {rows[0] or 'those of ' + str(processes[0]) + ' processes'}. Choose "
            "training.per_device_train_batch_size and gradient_accumulation_steps so that these times the number of "
            "processes are the same as then."
        )


def manifest_to_go_on_with(run: RunFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """The run's own manifest, with versions and processes of a new run's; see `require_same_start` for the rest."""
    require_same_start(run, manifest)
    return {**run.read_manifest(), "versions": manifest["versions"], "processes": manifest["processes"]}


def await_mark(checkpoint: Path) -> None:
    """Wait until this process sees that a checkpoint is complete: a network disk may show it late to some machines.

    Raises:
        PrefoptError: it does not see that.
    """
    until = time.monotonic() + SEEN_WITHIN
    while not (checkpoint / CHECKPOINT_MARK).is_file():
        if time.monotonic() > until:
            raise PrefoptError(
                f"{socket.gethostname()} does not see {checkpoint}, from which the main process goes on. All machines "
                "must share output_dir."
            )
        time.sleep(0.2)


def finished_steps(checkpoint: Path) -> TrainerState | None:
    """The trainer's state at a checkpoint of the last step, None where steps are left to train."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state if state.global_step >= state.max_steps else None


def restore_progress(trainer: PreferenceTrainer, checkpoint: Path) -> None:
    """Give the trainer back what the checkpoint's mark holds (token count, sums of the open logging window)."""
    mark = json.loads((checkpoint / CHECKPOINT_MARK).read_text(encoding="utf-8"))
    trainer.load_progress_state(mark, checkpoint)
