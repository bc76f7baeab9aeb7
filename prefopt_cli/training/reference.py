"""Reference log-probabilities of all data before training starts, so that no step needs the reference policy."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig

from prefopt_cli.data import TokenizedData
from prefopt_cli.scoring.cache import Policy, ScoreCache
from prefopt_cli.scoring.choice import Requested, choose_layout, wants_router_loss
from prefopt_cli.scoring.frozen import FrozenScores, score_frozen
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.policy_digest import policy_digest
from prefopt_cli.training.batches import example_of
from prefopt_cli.training.preparation import Prepared, extent
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.trainer import REFERENCE_COLUMNS

SCORES_VERSION = "1"
"""To be raised whenever the code gives another log-probability to the same tokens: old scores are then not found."""

TASK = "scoring with the reference policy"


def layout_for(model: Any, prepared: Prepared, args: DPOConfig, requested: Requested) -> Layout:
    """The layout of a run's batches, tried on its first pairs.

    Raises:
        UserError: the recipe insists on packing, and the model cannot be packed.
    """
    train = prepared.tokens.train
    first = train.select(range(min(args.train_batch_size, len(train))))
    sets = [train, *prepared.tokens.eval.values()]
    return choose_layout(
        model,
        [example_of(pair) for pair in first],
        longest=max(extent(rows)[0] for rows in sets),
        requested=requested,
        autocast=precision(args),
        router_loss=wants_router_loss(model.config, args.router_aux_loss_coef),
    )


def with_reference_scores(
    prepared: Prepared, model: nn.Module, args: DPOConfig, layout: Layout, name: str, reporter: Reporter
) -> tuple[TokenizedData, FrozenScores]:
    """The tokenised data with `REFERENCE_COLUMNS`, from the cache or from the model as it is at the start.

    Args:
        prepared: the run's data.
        model: the policy before any training step, which is the reference.
        args: training arguments, for the precision and the scoring batch.
        layout: the layout that `model` is prepared for.
        name: the reference policy in words, for those who look into the cache.
        reporter: told of progress and of trouble with the cache.
    """
    tokens = prepared.tokens
    sets = {"train": tokens.train, **tokens.eval}
    examples = [example_of(pair) for rows in sets.values() for pair in rows]
    autocast = "bf16" if args.bf16 else "fp16" if args.fp16 else "none"
    numerics = {"autocast": autocast, "device": args.device.type, "scores": SCORES_VERSION}
    digest = policy_digest(model, numerics=numerics)
    with ScoreCache(report=reporter.message) as cache:
        scores = score_frozen(
            model,
            examples,
            policy=Policy(digest, name),
            cache=cache,
            layout=layout,
            autocast=precision(args),
            padding_id=prepared.tokenizer.pad_token_id or 0,
            batch_examples=args.precompute_ref_batch_size,
            progress=lambda done, total: reporter.progress(TASK, done, total),
        )
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


def precision(args: DPOConfig) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that the trainer will run the model in."""
    if not (args.bf16 or args.fp16):
        return nullcontext
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return lambda: torch.autocast(args.device.type, dtype=dtype)
