"""Reference log-probabilities of all data before training starts, so that no step needs the reference policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import nn
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig

from prefopt_cli.data import TokenizedData
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.choice import scores_depend_on_batch, wants_router_loss
from prefopt_cli.scoring.frozen import FrozenScores
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.batches import examples_of, padding_id
from prefopt_cli.training.frozen_policies import agreed_layout, precision, score_sets
from prefopt_cli.training.preparation import Prepared, training_field
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.trainer import REFERENCE_COLUMNS

TASK = "scoring with the reference policy"


def layout_for(model: Any, recipe: Recipe, prepared: Prepared, args: DPOConfig) -> Layout:
    """The layout of a run's batches, tried on its first pairs.

    Raises:
        UserError: the recipe insists on packing, and the model cannot be packed.
    """
    train, requested = prepared.tokens.train, training_field(recipe.training, "attention_layout")
    first = train.select(range(min(args.train_batch_size, len(train))))
    options: dict[str, Any] = {
        "longest": max(prepared.longest, prepared.sampling.longest if prepared.sampling else 0),
        "autocast": precision(args),
        "router_loss": wants_router_loss(model.config, args.router_aux_loss_coef),
        "neftune": args.neftune_noise_alpha is not None,
    }
    return agreed_layout(model, examples_of(first), requested=requested, **options)


def with_reference(
    prepared: Prepared,
    model: Any,
    args: DPOConfig,
    layout: Layout,
    reporter: Reporter,
    stopping: Callable[[], bool],
    run: RunFolder,
    *,
    precomputes: bool,
    digest: str | None = None,
) -> Prepared:
    """The data as training needs it: with `REFERENCE_COLUMNS`, unless every step is to compute them.

    Eval sets are left out where nothing evaluates. The run's manifest says how many scores were computed.

    Raises:
        ScoringStopped: a signal came; what was scored until then is in the cache.
    """
    if not evaluates(args):
        prepared = replace(prepared, tokens=replace(prepared.tokens, eval={}))
    if not precomputes:
        return prepared
    if scores_depend_on_batch(model.config, prepared.longest):
        reporter.message(
            "The reference policy runs in every step: with its kind of rotary embeddings a score depends on the "
            "longest sequence of the batch."
        )
        return prepared
    tokens, scores = with_reference_scores(prepared, model, args, layout, reporter, stopping, digest)
    if args.process_index == 0:
        figures = {"responses": scores.responses, "computed": scores.computed}
        run.update_manifest(reference_scores=figures)
    return replace(prepared, tokens=tokens)


def with_reference_scores(
    prepared: Prepared,
    model: nn.Module,
    args: DPOConfig,
    layout: Layout,
    reporter: Reporter,
    stopping: Callable[[], bool],
    digest: str | None = None,
) -> tuple[TokenizedData, FrozenScores]:
    """The tokenised data with `REFERENCE_COLUMNS`, from the cache or from the model as it is at the start.

    Args:
        prepared: the run's data.
        model: the policy before any training step, which is the reference.
        args: training arguments, for the precision and the scoring batch.
        layout: the layout that `model` is prepared for.
        reporter: told of progress and of trouble with the cache.
        stopping: whether a signal has asked the run to stop.
        digest: of the model, where that is sharded.

    Raises:
        ScoringStopped: it has; what was scored until then is in the cache.
    """
    tokens = prepared.tokens
    sets = {"train": tokens.train, **tokens.eval}
    found = score_sets(
        model,
        sets,
        description=prepared.source.describe(),
        args=args,
        layout=layout,
        padding_id=padding_id(prepared.tokenizer, prepared.config),
        reporter=reporter,
        task=TASK,
        stopping=stopping,
        digest=digest,
    )
    scored: dict[str, Dataset] = {}
    for name, rows in sets.items():
        for side, column in enumerate(REFERENCE_COLUMNS):
            rows = rows.add_column(column, [pair[side] for pair in found.logps[name]])
        scored[name] = rows
    reporter.message(f"Reference log-probabilities: {found.found.describe()}.")
    return replace(tokens, train=scored.pop("train"), eval=scored), found.found


def evaluates(args: DPOConfig) -> bool:
    """Whether anything is evaluated during the run."""
    return bool(args.eval_strategy != IntervalStrategy.NO or args.eval_on_start)
