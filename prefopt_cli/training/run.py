"""One training run, from a recipe to a run folder."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerState
from trl import DPOConfig

from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.policy import describe_reference
from prefopt_cli.models.quantising import require_quantisation
from prefopt_cli.recipe import dump_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import atomic, metrics
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.frozen import ScoringStopped
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training import callbacks
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.building import build_trainer
from prefopt_cli.training.card import model_card
from prefopt_cli.training.engines import (
    require_engine,
    require_exportable,
    whole_models,
)
from prefopt_cli.training.export import export_policy
from prefopt_cli.training.failures import explained
from prefopt_cli.training.frozen_policies import (
    on_device,
    set_aside,
    shards,
    shared_digest,
)
from prefopt_cli.training.objectives import Objective, find_objective, precomputes, require_sound
from prefopt_cli.training.outcome import Outcome, already_finished, outcome_of
from prefopt_cli.training.preparation import Prepared, own_prompts, prepare
from prefopt_cli.training.previous import with_previous_margins
from prefopt_cli.training.processes import decided, signal_to_any
from prefopt_cli.training.record import exported_fingerprint, first_manifest, now
from prefopt_cli.training.reference import layout_for, with_reference
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.resume import (
    await_mark,
    finished_steps,
    manifest_to_go_on_with,
    require_resumable,
    restore_progress,
)
from prefopt_cli.training.trainer import PreferenceTrainer


def train(
    recipe: Recipe,
    *,
    recipe_folder: Path,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
    runs: RunFinder | None = None,
) -> Outcome:
    """Train what a recipe describes; everything it leaves behind is in the recipe's `output_dir`.

    Nothing is written before recipe, data, tokenizer and model have been found sound.

    Args:
        recipe: the validated recipe.
        recipe_folder: where a user's own f is looked for first.
        reporter: told what happens.
        resume: go on with the run in `output_dir` from its last complete checkpoint.
        overwrite: delete the run in `output_dir` first.
        runs: finds the runs of earlier stages, also moved ones.

    Raises:
        UserError: input that cannot work as it stands.
        PrefoptError: a full disk, exhausted memory, a loss that is not finite; checkpoints are kept.
        KeyboardInterrupt: a second signal asked to stop at once.
    """
    run = RunFolder(Path(recipe.output_dir).expanduser())
    run.require_writable()
    if resume:
        require_resumable(run, recipe)
        before = run.read_manifest()
        if before["status"] == "finished" and run.model.is_dir():
            return already_finished(run, before)
        recipe_folder = Path(before["recipe_folder"])
    else:
        run.require_free(overwrite=overwrite)
    require_engine()
    require_sound(recipe.method, recipe_folder)
    require_quantisation(recipe)
    prepared = prepare(recipe, reporter, runs)
    objective = find_objective(recipe.method, recipe_folder, prepared.ancestry)
    reporter.message(f"Method: {objective.description}.")
    _require_elsewhere(run, recipe, prepared)
    require_exportable(prepared.skeleton)
    args = training_arguments(recipe, run, evaluates=bool(prepared.tokens.eval))
    manifest = first_manifest(
        recipe, prepared, figures=objective.figures, recipe_folder=recipe_folder, args=args
    )
    if resume:
        manifest = manifest_to_go_on_with(run, manifest)
    if objective.reference != "none":
        reference = describe_reference(prepared.source, recipe.adapter, stacked=prepared.stacked)
        reporter.message(f"Reference policy: {reference}.")
    with whole_models(args), explained(run):
        model, digest = _loaded(recipe, prepared, objective, args)
        layout = layout_for(model, recipe, prepared, args)
    reporter.message(layout.note)
    main_process = args.process_index == 0
    open_run = _opened(run, recipe, manifest, resume=resume, overwrite=overwrite)
    card = model_card(recipe, dump_recipe(recipe), manifest)
    with explained(run), open_run if main_process else nullcontext(), callbacks.stopping_gently() as stop:
        try:
            with whole_models(args):
                prepared = _with_scores(
                    prepared, recipe, objective, model, args, layout, reporter, stop, run, digest
                )
        except ScoringStopped:
            stop.hear()
            outcome = Outcome(run, "interrupted", step=0, total_steps=0, signal=stop.received)
        else:
            trainer = build_trainer(
                recipe, prepared, model, args, objective, card, layout, samples_file=run.samples
            )
            outcome = _run_trainer(trainer, run, reporter, stop, resume=resume)
            if outcome.status == "finished":
                export_policy(trainer, prepared.tokenizer, run, card)
        if main_process:
            _record(run, outcome, prepared)
        PartialState().wait_for_everyone()  # a signal while the main process writes is heard gently by all
    # It may come too late to interrupt this run; whoever trains on afterwards must know of it.
    return replace(outcome, signal=signal_to_any(stop))


def _loaded(
    recipe: Recipe, prepared: Prepared, objective: Objective, args: DPOConfig
) -> tuple[Any, str | None]:
    """The policy on its device, and its digest where it is taken apart there."""
    model: Any = loading.load_model(
        prepared.source, recipe.model, recipe.adapter, frozen=prepared.stacked, device=args.device
    )
    scores = shards(recipe) and precomputes(recipe, objective)
    digest = shared_digest(model, args, sharded=True) if scores else None
    return on_device(model, recipe, args), digest


def _with_scores(
    prepared: Prepared,
    recipe: Recipe,
    objective: Objective,
    model: Any,
    args: DPOConfig,
    layout: Layout,
    reporter: Reporter,
    stop: callbacks.StopSignal,
    run: RunFolder,
    digest: str | None,
) -> Prepared:
    """The data with what frozen policies find of it: the reference, and those of earlier stages."""
    use = precomputes(recipe, objective)
    prepared = with_reference(
        prepared, model, args, layout, reporter, stop.asked, run, precomputes=use, digest=digest
    )
    if prepared.ancestry is None:
        return prepared
    with set_aside(model, args):
        return with_previous_margins(prepared, prepared.ancestry, recipe, args, reporter, stop.asked)


def _run_trainer(
    trainer: PreferenceTrainer,
    run: RunFolder,
    reporter: Reporter,
    stop: callbacks.StopSignal,
    *,
    resume: bool,
) -> Outcome:
    """Train with everything that goes on around the steps."""
    # Rotation must wait until the newest checkpoint is marked complete, so it is not left to the library.
    keep, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    for callback in (
        callbacks.MetricsFile(run),
        callbacks.Progress(reporter, trainer.passing_figures),
        callbacks.Stopping(stop),
        callbacks.CheckpointMark(run, keep, trainer.progress_state),
    ):
        trainer.add_callback(callback)
    checkpoint = _checkpoint(run, trainer, reporter) if resume else None
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # the start was evaluated when the run began
    return outcome_of(_train(trainer, run, checkpoint), run, stop)


def _train(trainer: PreferenceTrainer, run: RunFolder, checkpoint: Path | None) -> TrainerState:
    """Train what is left to train; returns the state at the end."""
    finished = finished_steps(checkpoint) if checkpoint else None
    if finished is None:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer.state
    best = finished.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer.add_callback(callbacks.OnlyLoad())
    with suppress(callbacks.AlreadyTrained):
        # The path was written down where the run lay then; it may have been moved.
        trainer.train(resume_from_checkpoint=str(run.checkpoints / Path(best).name if best else checkpoint))
    return finished


def _require_elsewhere(run: RunFolder, recipe: Recipe, prepared: Prepared) -> None:
    """Refuse to write over what the run reads."""
    sets = [recipe.dataset.train, *recipe.dataset.eval.values(), own_prompts(recipe) or []]
    earlier = [source for _, source in prepared.ancestry.earlier] if prepared.ancestry else []
    read = [recipe.model.chat_template]
    for policy in (prepared.source, *earlier):
        read += [policy.weights, str(policy.adapter) if policy.adapter else None]
    read += [each.source for sources in sets for each in sources]
    # A hub id or a scheme's name is no place here, whatever folder it would resolve to.
    for place in (Path(each).expanduser() for each in read if each):
        if place.exists() and place.resolve().is_relative_to(run.path.resolve()):
            raise UserError(
                f"output_dir {run.path} holds {place}, which the run reads. Choose another output_dir."
            )


@contextmanager
def _opened(
    run: RunFolder, recipe: Recipe, manifest: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """The run's folder, held by this process; whatever happens in the block, the manifest says how it ended."""
    with run.held():
        if resume:
            callbacks.remove_unfinished(run.checkpoints)
            going_on = {name: manifest[name] for name in ("versions", "processes")}
            run.update_manifest(status="running", **going_on, ended=None, error=None)
            atomic.write_text(run.recipe, dump_recipe(recipe))
        else:
            run.create(manifest, dump_recipe(recipe), overwrite=overwrite)
        try:
            yield
        except BaseException as error:
            callbacks.remove_unfinished(run.checkpoints)
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the disk may be the very thing that is full
                run.update_manifest(status=status, ended=now(), error=str(error)[:2000] or None)
            raise


def _record(run: RunFolder, outcome: Outcome, prepared: Prepared) -> None:
    exported = exported_fingerprint(run, prepared) if outcome.status == "finished" else None
    run.update_manifest(
        policy=exported,
        status=outcome.status,
        ended=now(),
        step=outcome.step,
        steps=outcome.total_steps,
        metrics=outcome.metrics,
    )


def _checkpoint(run: RunFolder, trainer: PreferenceTrainer, reporter: Reporter) -> Path | None:
    """The checkpoint to go on from, with what was logged since wound back to it."""
    checkpoint = decided(run.last_checkpoint)
    if checkpoint is not None:
        await_mark(checkpoint)
    if checkpoint is None:
        reporter.message("The run has no complete checkpoint yet: it starts over from step 0.")
    else:
        restore_progress(trainer, checkpoint)
        reporter.message(f"Resuming from {checkpoint}.")
    if trainer.is_world_process_zero():
        step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else -1
        for file in (run.metrics, run.samples):
            metrics.rewind(file, step)
    return checkpoint
