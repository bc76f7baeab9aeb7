"""Log-probabilities of tokenised data under policies that do not change, through the score cache."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from trl import DPOConfig

from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.models.quantising import computed_as
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.scoring.cache import Policy, ScoreCache, response_key
from prefopt_cli.scoring.choice import Requested, choose_layout
from prefopt_cli.scoring.frozen import FrozenScores, score_frozen
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.scoring.policy_digest import policy_digest
from prefopt_cli.training.batches import examples_of
from prefopt_cli.training.engines import agreed, engine, is_sharded, shard
from prefopt_cli.training.preparation import training_field
from prefopt_cli.training.reporting import Reporter

SCORES_VERSION = "1"
"""To be raised whenever the code gives another log-probability to the same tokens: old scores are then not found."""

Sets = Mapping[str, Dataset]


@dataclass(frozen=True)
class SetScores:
    """Log-probabilities of the responses of several sets under one policy."""

    logps: dict[str, list[list[float]]]
    """By set, for every row those of its responses, in nats."""
    found: FrozenScores
    """What it took to have them."""


def score_sets(
    model: nn.Module,
    sets: Sets,
    *,
    description: str,
    args: DPOConfig,
    layout: Layout,
    padding_id: int,
    reporter: Reporter,
    task: str,
    stopping: Callable[[], bool] = lambda: False,
    digest: str | None = None,
) -> SetScores:
    """Score every response of the sets, with all processes; what the cache holds is read.

    Args:
        model: the policy on its device, prepared by `layout`.
        sets: tokenised, by name.
        description: the policy, for people who look into the cache.
        args: training arguments, for the precision and the scoring batch.
        layout: of the batches.
        padding_id: fills rows up.
        reporter: told of progress, under the name `task`, and of trouble with the cache.
        task: what is being done.
        stopping: whether a signal has asked the run to stop.
        digest: of the policy, where it is known; a sharded model has none.

    Raises:
        ScoringStopped: it has; what was scored until then is in the cache.
    """
    examples = [example for rows in sets.values() for example in examples_of(rows)]
    sharded = is_sharded(model)
    digest = digest or shared_digest(model, args)
    try:
        with ScoreCache(report=reporter.message) as cache:
            scores = score_frozen(
                model,
                examples,
                policy=Policy(digest, description),
                cache=cache,
                layout=layout,
                autocast=precision(args),
                padding_id=padding_id,
                batch_examples=args.precompute_ref_batch_size,
                progress=lambda done, total: reporter.progress(task, done, total),
                stopping=agreed(stopping, args.device) if sharded else stopping,
                together=sharded,
                device=args.device,
            )
    finally:
        if args.device.type == "cuda":
            torch.cuda.empty_cache()  # the peak of scoring must not stay reserved
    logps: dict[str, list[list[float]]] = {}
    start = 0
    for name, rows in sets.items():
        logps[name] = scores.logps[start : start + len(rows)]
        start += len(rows)
    return SetScores(logps, scores)


def score_policy(
    source: PolicySource,
    recipe: Recipe,
    sets: Sets,
    *,
    args: DPOConfig,
    padding_id: int,
    reporter: Reporter,
    task: str,
    stopping: Callable[[], bool] = lambda: False,
) -> SetScores:
    """`score_sets` with a policy that is loaded for it, and gone afterwards.

    Args:
        source: the policy.
        recipe: of the run that wants the scores: how models are loaded and laid out.
        sets: tokenised, by name.
        args, padding_id, reporter, task, stopping: see `score_sets`.

    Raises:
        UserError: the policy cannot be loaded.
        ScoringStopped: see `score_sets`.
    """
    with loaded(source, recipe, args, placed=False) as model:
        digest = shared_digest(model, args, sharded=shards(recipe))
        model = on_device(model, recipe, args)
        examples = [example for rows in sets.values() for example in examples_of(rows)]
        layout = agreed_layout(
            model,
            examples[: args.train_batch_size],
            longest=max((each.longest for each in examples), default=0),
            requested=training_field(recipe.training, "attention_layout"),
            autocast=precision(args),
        )
        return score_sets(
            model,
            sets,
            description=source.describe(),
            args=args,
            layout=layout,
            padding_id=padding_id,
            reporter=reporter,
            task=task,
            stopping=stopping,
            digest=digest,
        )


def shared_digest(model: nn.Module, args: DPOConfig, *, sharded: bool = False) -> str:
    """The digest of a whole policy, computed by the main process for all.

    Args:
        model: the policy, with its weights at least in the main process.
        args: training arguments, for the precision.
        sharded: whether it will be asked in parts.
    """
    held = [policy_digest(model, numerics=numerics(args, sharded=sharded)) if args.process_index == 0 else ""]
    broadcast_object_list(held, from_process=0)
    return held[0]


def shards(recipe: Recipe) -> bool:
    """Whether the run's policies are taken apart before anything is computed with them: where all weights are trained.

    Under an adapter the policy stays whole, in its checkpoint's type, until the trainer has added the adapter.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and engine() == "fsdp" and recipe.adapter == "none"


def on_device(model: nn.Module, recipe: Recipe, args: DPOConfig) -> nn.Module:
    """A loaded policy where it is computed: whole in every process, or in parts."""
    if getattr(model, "is_quantized", False):  # quantised weights are where they were loaded to
        return model
    return shard(model, args) if shards(recipe) else model.to(args.device)


def unscored(source: PolicySource, recipe: Recipe, sets: Sets, args: DPOConfig) -> tuple[int, int]:
    """(different responses of the sets, those that the cache does not hold under this policy).

    The policy is loaded for it, since only its weights tell what it is.
    """
    with loaded(source, recipe, args) as model:
        digest = policy_digest(model, numerics=numerics(args))
    keys = {
        response_key(example.prompt, response)
        for rows in sets.values()
        for example in examples_of(rows)
        for response in example.responses
    }
    with ScoreCache() as cache:
        known = cache.read(Policy(digest, source.describe()), list(keys))
    return len(keys), int(torch.from_numpy(known).isnan().sum())


@contextmanager
def loaded(
    source: PolicySource, recipe: Recipe, args: DPOConfig, *, placed: bool = True
) -> Iterator[nn.Module]:
    """A policy within the block, loaded as a run of the recipe would load its start; `placed`: on its device."""
    source = computed_as(source, recipe)
    model = loading.load_model(source, recipe.model, recipe.adapter, frozen=True, device=args.device)
    if placed and not getattr(model, "is_quantized", False):
        model = model.to(args.device)
    try:
        yield model.eval().requires_grad_(False)
    finally:
        del model
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def set_aside(model: nn.Module, args: DPOConfig) -> Iterator[None]:
    """Make room on an accelerator within the block, where others are scored; quantised and sharded weights stay."""
    stays = getattr(model, "is_quantized", False) or is_sharded(model)
    moves = args.device.type != "cpu" and not stays
    if moves:
        model.to("cpu")
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        if moves:
            model.to(args.device)


def agreed_layout(
    model: nn.Module, examples: Sequence[Example], *, requested: Requested, **options: Any
) -> Layout:
    """The layout that all processes can use, tried on some examples; for the rest see `choose_layout`.

    Raises:
        UserError: packing is requested, and the model cannot be packed.
    """
    layout = choose_layout(model, examples, requested=requested, **options)
    if len(set(gather_object([layout.way]))) > 1:  # each process tried for itself, and all must do the same
        layout = choose_layout(model, [], requested="padded", **options)
        return replace(layout, note="Layout: padded rows, because not every process can pack.")
    return layout


def numerics(args: DPOConfig, *, sharded: bool = False) -> dict[str, str]:
    """What decides a log-probability besides the policy and the tokens.

    FSDP casts all weights to half precision; autocast by itself leaves norms and embeddings as they are.
    """
    half = args.mixed_precision in ("bf16", "fp16")
    return {
        **({"engine": "fsdp"} if sharded and half else {}),
        "autocast": args.mixed_precision if half else "none",
        "device": args.device.type,
        "matmul": f"{torch.get_float32_matmul_precision()}, tf32 {torch.backends.cuda.matmul.allow_tf32}",
        "transformers": transformers.__version__,
        "scores": SCORES_VERSION,
    }


def precision(args: DPOConfig) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that the trainer will run the model in, whether the recipe or accelerate asks for it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    return nullcontext if dtype is None else lambda: torch.autocast(args.device.type, dtype=dtype)
