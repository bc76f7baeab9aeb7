"""Log-probabilities of tokenised data under policies that do not change, through the score cache."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from trl import DPOConfig

from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.scoring.cache import Policy, ScoreCache, response_key
from prefopt_cli.scoring.choice import Requested, choose_layout
from prefopt_cli.scoring.frozen import FrozenScores, score_frozen
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.scoring.policy_digest import policy_digest
from prefopt_cli.training.batches import examples_of
from prefopt_cli.training.preparation import training_field
from prefopt_cli.training.reporting import Reporter

SCORES_VERSION = "1"
"""To be raised whenever the code gives another log-probability to the same tokens: old scores are then not found."""

Sets = Mapping[str, Dataset]


class ScoringStopped(Exception):
    """A signal came while the data was scored."""


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

    Raises:
        ScoringStopped: it has; what was scored until then is in the cache.
    """
    examples = [example for rows in sets.values() for example in examples_of(rows)]
    digest = policy_digest(model, numerics=numerics(args))

    def progress(done: int, total: int) -> None:
        reporter.progress(task, done, total)
        if stopping():
            raise ScoringStopped

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
                progress=progress,
            )
    except RuntimeError as error:
        if stopping():  # another process has left first, while this one waited for its scores
            raise ScoringStopped from error
        raise
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
    with loaded(source, recipe, args) as model:
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
        )


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
def loaded(source: PolicySource, recipe: Recipe, args: DPOConfig) -> Iterator[nn.Module]:
    """A policy on the run's device within the block, loaded as a run of the recipe would load it as its start."""
    model = loading.load_model(source, recipe.model, recipe.adapter, frozen=True)
    if not getattr(model, "is_quantized", False):  # quantised weights are where they were loaded to
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
    """Make room on an accelerator within the block, where other policies are scored; quantised weights stay."""
    moves = args.device.type != "cpu" and not getattr(model, "is_quantized", False)
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
