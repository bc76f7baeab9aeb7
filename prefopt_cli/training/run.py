"""One training run, from a recipe to a run folder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl import DPOConfig

from prefopt_cli.losses.gpo import ConvexFunction
from prefopt_cli.models import loading
from prefopt_cli.models.policy import describe_reference
from prefopt_cli.recipe import dump_recipe
from prefopt_cli.recipe.schema import LoraAdapter, Recipe
from prefopt_cli.runs import atomic, metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training import callbacks
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.card import model_card
from prefopt_cli.training.export import export_policy
from prefopt_cli.training.failures import explained
from prefopt_cli.training.functions import describe_probe, find_function, require_usable
from prefopt_cli.training.gpo import GPOTrainer
from prefopt_cli.training.preparation import Prepared, prepare
from prefopt_cli.training.record import first_manifest, now
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.resume import require_resumable, require_same_data, restore_progress
from prefopt_cli.training.trainer import PreferenceTrainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: RunFolder
    status: Literal["finished", "interrupted"]
    step: int
    total_steps: int
    signal: int | None = None
    """The signal that interrupted it."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last logged figures of training and of every eval set."""


def train(
    recipe: Recipe, *, recipe_folder: Path, reporter: Reporter, resume: bool = False, overwrite: bool = False
) -> Outcome:
    """Train what a recipe describes; everything it leaves behind is in the recipe's `output_dir`.

    Nothing is written before recipe, data, tokenizer and model have been found sound.

    Args:
        recipe: the validated recipe.
        recipe_folder: where a user's own f is looked for first.
        reporter: told what happens.
        resume: go on with the run in `output_dir` from its last complete checkpoint.
        overwrite: delete the run in `output_dir` first.

    Raises:
        UserError: input that cannot work as it stands.
        PrefoptError: a full disk, exhausted memory, a loss that is not finite; checkpoints are kept.
        KeyboardInterrupt: a second signal asked to stop at once.
    """
    run = RunFolder(Path(recipe.output_dir).expanduser())
    run.require_writable()
    if resume:
        require_resumable(run, recipe)
        if run.read_manifest()["status"] == "finished":
            return _already_finished(run)
    else:
        run.require_free(overwrite=overwrite)
    function, figures = _method_function(recipe, recipe_folder, reporter)
    prepared = prepare(recipe, reporter)
    if resume:
        require_same_data(run, prepared.tokens.fingerprints)
    args = training_arguments(recipe, run, evaluates=bool(prepared.tokens.eval))
    model = loading.load_model(prepared.source, recipe.model, recipe.adapter)
    reporter.message(f"Reference policy: {describe_reference(prepared.source, recipe.adapter)}.")
    manifest = first_manifest(
        recipe, prepared.source, prepared.tokens.receipt.to_dict(), prepared.tokens.fingerprints, figures
    )
    card = model_card(recipe, dump_recipe(recipe), manifest)
    main_process = args.process_index == 0
    opened = (
        _opened(run, recipe, manifest, resume=resume, overwrite=overwrite) if main_process else nullcontext()
    )
    with opened, explained(run), callbacks.stopping_gently() as stop:
        # Rotation must wait until the newest checkpoint is marked complete, so it is not left to the library.
        keep, args.save_total_limit = args.save_total_limit, None
        trainer = build_trainer(recipe, prepared, model, args, function, card)
        for callback in (
            callbacks.MetricsFile(run),
            callbacks.Progress(reporter),
            callbacks.StopOnSignal(stop),
            callbacks.CheckpointMark(run, keep, trainer.progress_state),
        ):
            trainer.add_callback(callback)
        checkpoint = _checkpoint(run, trainer, reporter) if resume else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        outcome = _outcome(trainer, run, stop)
        if outcome.status == "finished":
            export_policy(trainer, prepared.tokenizer, run, card)
        if main_process:
            _record(run, outcome)
    return outcome


def build_trainer(
    recipe: Recipe, prepared: Prepared, model: Any, args: DPOConfig, function: ConvexFunction, card: str
) -> PreferenceTrainer:
    """The method's trainer with its reference policy."""
    return GPOTrainer(
        settings=recipe.method,
        function=function,
        model=model,
        # An adapter needs no second model: the reference is the model without it, or with a frozen copy of it.
        ref_model=None if isinstance(recipe.adapter, LoraAdapter) else copy.deepcopy(model),
        args=args,
        train_dataset=prepared.tokens.train,
        eval_dataset=prepared.tokens.eval,
        processing_class=prepared.tokenizer,
        peft_config=loading.new_adapter(prepared.source, recipe.adapter),
        card=card,
    )


def _method_function(
    recipe: Recipe, folder: Path, reporter: Reporter
) -> tuple[ConvexFunction, dict[str, Any]]:
    loss = recipe.method.loss
    function = find_function(loss, folder)
    found = require_usable(loss, function)
    reporter.message(describe_probe(loss, found))
    return function, asdict(found)


@contextmanager
def _opened(
    run: RunFolder, recipe: Recipe, manifest: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """The run's folder, held by this process; whatever happens in the block, the manifest says how it ended."""
    if not resume:
        run.create(overwrite=overwrite)
    with run.held():
        if resume:
            callbacks.remove_unfinished(run.checkpoints)
            run.update_manifest(status="running", versions=manifest["versions"])
        else:
            atomic.write_json(run.manifest, manifest)
        atomic.write_text(run.recipe, dump_recipe(recipe))
        try:
            yield
        except BaseException as error:
            callbacks.remove_unfinished(run.checkpoints)
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the disk may be the very thing that is full
                run.update_manifest(status=status, ended=now(), error=str(error)[:2000])
            raise


def _record(run: RunFolder, outcome: Outcome) -> None:
    run.update_manifest(
        status=outcome.status,
        ended=now(),
        step=outcome.step,
        steps=outcome.total_steps,
        metrics=outcome.metrics,
    )


def _checkpoint(run: RunFolder, trainer: PreferenceTrainer, reporter: Reporter) -> Path | None:
    """The checkpoint to go on from, with metrics.jsonl wound back to it."""
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        reporter.message("The run has no complete checkpoint yet: it starts over from step 0.")
    else:
        restore_progress(trainer, checkpoint)
        reporter.message(f"Resuming from {checkpoint}.")
    if trainer.is_world_process_zero():
        metrics.rewind(run.metrics, int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else -1)
    return checkpoint


def _outcome(trainer: PreferenceTrainer, run: RunFolder, stop: callbacks.StopSignal) -> Outcome:
    state = trainer.state
    stopped = stop.received is not None and state.global_step < state.max_steps
    return Outcome(
        run=run,
        status="interrupted" if stopped else "finished",
        step=state.global_step,
        total_steps=state.max_steps,
        signal=stop.received if stopped else None,
        metrics=_last_figures(state.log_history),
    )


def _last_figures(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of every logged figure."""
    figures: dict[str, Any] = {}
    for record in history:
        figures.update(record)
    return figures


def _already_finished(run: RunFolder) -> Outcome:
    manifest = run.read_manifest()
    return Outcome(
        run, "finished", manifest.get("step", 0), manifest.get("steps", 0), None, manifest["metrics"]
    )
