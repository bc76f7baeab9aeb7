"""How far a policy has moved from its reference, on what it writes itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from prefopt_cli.evaluation.held_out import HeldOutSet
from prefopt_cli.evaluation.statistics import Estimate, mean_with_interval
from prefopt_cli.evaluation.targets import Target
from prefopt_cli.models import loading
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.frozen import ScoringStopped
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.batches import padding_id
from prefopt_cli.training.frozen_policies import loaded, precision, score_policy
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.sampling import sample_responses

NEW_TOKENS = 128
"""Tokens of a sample, at most; of a longer one the divergence of the beginning is told."""

BATCH = 16


@dataclass(frozen=True)
class KLSettings:
    """What is sampled."""

    prompts: int
    """How many of the held-out prompts get a sample; 0: none."""
    max_new_tokens: int
    seed: int


class Divergence(NamedTuple):
    """A KL, and what it is an average over."""

    kl: Estimate
    """In nats."""
    prompts: int
    """Each with one sample."""


def settings_for(targets: Sequence[Target], prompts: int, seed: int) -> KLSettings | None:
    """The same samples' length for all policies: `NEW_TOKENS`, or half of the shortest context; None for no prompts."""
    if not prompts:
        return None
    contexts = [context for target in targets if (context := _context(target))]
    return KLSettings(prompts, min([NEW_TOKENS, *(context // 2 for context in contexts)]), seed)


def kl_to_reference(
    target: Target,
    sets: Sequence[HeldOutSet],
    settings: KLSettings,
    reporter: Reporter,
    stopping: Callable[[], bool] = lambda: False,
) -> Divergence | None:
    """KL(policy || reference) over whole responses, in nats: the mean of log pi(y) - log pi_ref(y), y from the policy.

    The estimate is unbiased for responses cut off at `max_new_tokens`. Prompts that leave no room for so many in the
    model's context are left out.

    Args:
        target: the policy; None comes back where it has no reference.
        sets: whose prompts are answered.
        settings: how many prompts, how long samples, which random stream.
        reporter: told of progress.
        stopping: whether a signal has asked to stop.

    Raises:
        UserError: a policy cannot be loaded.
        ScoringStopped: a signal came.
    """
    if target.reference is None:
        return None
    prompts = _prompts(sets, settings, _context(target))
    if not prompts:
        reporter.message(
            f"No KL of {target.name}: no held-out prompt leaves room for {settings.max_new_tokens} tokens in its "
            "context."
        )
        return None
    config = loading.load_config(target.source, target.recipe.model)
    tokenizer = loading.load_tokenizer(target.source, target.recipe.model)
    padding = padding_id(tokenizer, config)
    run = target.run or RunFolder(Path(target.recipe.output_dir))
    args = training_arguments(target.recipe, run, evaluates=False)

    def respond(model: nn.Module, start: int) -> list[list[int]]:
        return sample_responses(
            model,
            prompts[start : start + BATCH],
            max_new_tokens=settings.max_new_tokens,
            stop_ids=sets[0].stop_ids,
            padding_id=padding,
            seed=settings.seed + start,
            autocast=precision(args),
        )

    with loaded(target.source, target.recipe, args) as model:
        samples = _shared_out(len(prompts), partial(respond, model), reporter, stopping)
    del model  # scoring needs the room
    rows = {"samples": _as_rows(prompts, samples)}
    own, its = (
        score_policy(
            source,
            target.recipe,
            rows,
            args=args,
            padding_id=padding,
            reporter=reporter,
            task="scoring samples",
            stopping=stopping,
        ).logps["samples"]
        for source in (target.source, target.reference)
    )
    return Divergence(mean_with_interval((np.array(own) - np.array(its)).ravel()), len(prompts))


def _shared_out(
    prompts: int,
    respond: Callable[[int], list[list[int]]],
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> list[list[int]]:
    """A sample for every prompt, in order; each process writes a share of the batches, and all get all.

    Raises:
        ScoringStopped: a signal came.
    """
    starts = range(0, prompts, BATCH)
    state = PartialState()
    own_share = starts[state.process_index :: state.num_processes]
    written: dict[int, list[list[int]]] = {}
    for done, start in enumerate(own_share):
        reporter.progress("sampling for the KL", done, len(own_share))
        if stopping():
            break
        written[start] = respond(start)
    reporter.progress("sampling for the KL", len(own_share), len(own_share))
    parts = gather_object([written])
    # All leave here: one that left at once would keep the others waiting.
    if sum(map(len, parts)) < len(starts):
        raise ScoringStopped
    together = {start: made for part in parts for start, made in part.items()}
    return [sample for start in starts for sample in together[start]]


def _context(target: Target) -> int | None:
    config = loading.load_config(target.source, target.recipe.model)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _prompts(sets: Sequence[HeldOutSet], settings: KLSettings, context: int | None) -> list[list[int]]:
    """Different prompts that leave room for a sample: the same for every policy of the same tokenizer."""
    different = dict.fromkeys(tuple(ids) for each in sets for ids in each.tokens["prompt_ids"][:])
    fitting = [
        list(ids)
        for ids in different
        if ids and (context is None or len(ids) + settings.max_new_tokens <= context)
    ]
    order = np.random.default_rng(settings.seed).permutation(len(fitting))[: settings.prompts]
    return [fitting[place] for place in sorted(order.tolist())]


def _as_rows(prompts: Sequence[Sequence[int]], samples: Sequence[Sequence[int]]) -> Dataset:
    return Dataset.from_dict(
        {
            "row_id": [str(number) for number in range(len(prompts))],
            "prompt_ids": [list(each) for each in prompts],
            "response_ids": [[list(each)] for each in samples],
            "ranks": [[0] for _ in samples],
        }
    )
