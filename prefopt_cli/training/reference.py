"""Reference log-probabilities of all data before training starts, so that no step needs the reference policy."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig

from prefopt_cli.data import TokenizedData
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.cache import Policy, ScoreCache
from prefopt_cli.scoring.choice import choose_layout, scores_depend_on_batch, wants_router_loss
from prefopt_cli.scoring.frozen import FrozenScores, score_frozen
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.policy_digest import policy_digest
from prefopt_cli.training.batches import examples_of, padding_id
from prefopt_cli.training.preparation import Prepared, training_field
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.trainer import REFERENCE_COLUMNS

SCORES_VERSION = "1"
"""To be raised whenever the code gives another log-probability to the same tokens: old scores are then not found."""

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
    layout = choose_layout(model, examples_of(first), requested=requested, **options)
    if len(set(gather_object([layout.way]))) > 1:  # each process tried for itself, and all must do the same
        layout = choose_layout(model, [], requested="padded", **options)
        return replace(layout, note="Layout: padded rows, because not every process can pack.")
    return layout


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
    tokens, scores = with_reference_scores(prepared, model, args, layout, reporter, stopping)
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
) -> tuple[TokenizedData, FrozenScores]:
    """The tokenised data with `REFERENCE_COLUMNS`, from the cache or from the model as it is at the start.

    Args:
        prepared: the run's data.
        model: the policy before any training step, which is the reference.
        args: training arguments, for the precision and the scoring batch.
        layout: the layout that `model` is prepared for.
        reporter: told of progress and of trouble with the cache.
        stopping: whether a signal has asked the run to stop.

    Raises:
        ScoringStopped: it has; what was scored until then is in the cache.
    """
    tokens = prepared.tokens
    sets = {"train": tokens.train, **tokens.eval}
    examples = [example for rows in sets.values() for example in examples_of(rows)]
    digest = policy_digest(model, numerics=numerics(args))

    def progress(done: int, total: int) -> None:
        reporter.progress(TASK, done, total)
        if stopping():
            raise ScoringStopped

    try:
        with ScoreCache(report=reporter.message) as cache:
            scores = score_frozen(
                model,
                examples,
                policy=Policy(digest, prepared.source.describe()),
                cache=cache,
                layout=layout,
                autocast=precision(args),
                padding_id=padding_id(prepared.tokenizer, prepared.config),
                batch_examples=args.precompute_ref_batch_size,
                progress=progress,
            )
    except RuntimeError as error:
        if stopping():  # another process has left first, while this one waited for its scores
            raise ScoringStopped from error
        raise
    if args.device.type == "cuda":
        torch.cuda.empty_cache()  # the peak of scoring must not stay reserved while training
    scored: dict[str, Dataset] = {}
    start = 0
    for set_name, rows in sets.items():
        pairs = scores.logps[start : start + len(rows)]
        start += len(rows)
        for side, column in enumerate(REFERENCE_COLUMNS):
            rows = rows.add_column(column, [pair[side] for pair in pairs])
        scored[set_name] = rows
    reporter.message(f"Reference log-probabilities: {scores.describe()}.")
    return replace(tokens, train=scored.pop("train"), eval=scored), scores


class ScoringStopped(Exception):
    """A signal came while the data was scored."""


def evaluates(args: DPOConfig) -> bool:
    """Whether anything is evaluated during the run."""
    return bool(args.eval_strategy != IntervalStrategy.NO or args.eval_on_start)


def numerics(args: DPOConfig) -> dict[str, str]:
    """What decides a log-probability besides the policy and the tokens."""
    return {
        "autocast": "bf16" if args.bf16 else "fp16" if args.fp16 else "none",
        "device": args.device.type,
        "matmul": f"{torch.get_float32_matmul_precision()}, tf32 {torch.backends.cuda.matmul.allow_tf32}",
        "transformers": transformers.__version__,
        "scores": SCORES_VERSION,
    }


def precision(args: DPOConfig) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that the trainer will run the model in."""
    if not (args.bf16 or args.fp16):
        return nullcontext
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return lambda: torch.autocast(args.device.type, dtype=dtype)
