"""Log-probabilities of responses under a policy that does not change: each computed once, then read from the cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from prefopt_cli.errors import PrefoptError
from prefopt_cli.scoring.cache import Policy, ScoreCache, response_key
from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of a scoring batch; without gradients many fit."""

Progress = Callable[[int, int], None]


class ScoringStopped(Exception):
    """A signal came while the data was scored; every process leaves at the same place."""


@dataclass(frozen=True)
class FrozenScores:
    """Log-probabilities under a frozen policy, and what it took to have them."""

    logps: list[list[float]]
    """For every example those of its responses, in nats."""
    responses: int
    """Different responses (the same one to the same prompt counts once)."""
    computed: int
    """Responses that went through the model now, in all processes; the others came from the cache."""
    tokens: int
    """Tokens that went through the model for them in this process, prompts once per batch."""
    seconds: float
    """What that took."""

    def describe(self) -> str:
        """One line for the user."""
        cached = self.responses - self.computed
        if not self.computed:
            return f"{self.responses:,} responses, all from the cache"
        source = f", {cached:,} from the cache" if cached else ""
        return f"{self.responses:,} responses{source}, {self.computed:,} computed in {self.seconds:.1f} s"


def score_frozen(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    policy: Policy,
    cache: ScoreCache,
    layout: Layout,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    padding_id: int = 0,
    batch_examples: int | None = None,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
    together: bool = False,
    device: torch.device | None = None,
) -> FrozenScores:
    """Score the responses of all examples; what the cache knows is not computed again.

    Every batch is written to the cache as soon as it is done, so interrupted work is not lost. With several
    processes each computes a share; all must call this with the same examples, and all get all scores.

    Args:
        model: the frozen policy on its device, prepared by ``layout``.
        examples: prompts with one or more responses each.
        policy: the address of the model's scores; see `policy_digest`.
        cache: where scores are kept.
        layout: packed or padded.
        autocast: the precision to run in.
        padding_id: id that fills rows up.
        batch_examples: at most so many prompts in a batch (besides the limit of `BATCH_TOKENS`).
        progress: told how many of the missing responses are done, in this process's share.
        stopping: asked after every batch whether to stop; where any process is to, all do once their batch is done.
        together: whether every batch takes all processes, each of which has a part of the model's weights.
        device: where the model is computed, if that is not where its weights are.

    Raises:
        ScoringStopped: some process was to stop; what was scored until then is in the cache.
    """
    start = time.perf_counter()
    keys = [
        [response_key(example.prompt, response) for response in example.responses] for example in examples
    ]
    unique = list(dict.fromkeys(key for listed in keys for key in listed))
    state = PartialState()
    # One process reads for all: others may be writing, and all must see the same gaps.
    known = _broadcast(cache.read(policy, unique) if state.is_main_process else None)
    scores = {key: float(logp) for key, logp in zip(unique, known, strict=True) if not np.isnan(logp)}
    missing = _missing(examples, keys, scores)
    device = device or next(model.parameters()).device
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    parts = [part for group in missing for part in _parts(group, layout, budget)]
    batches = list(_batches(parts, layout, budget, batch_examples))
    share = batches[state.process_index :: state.num_processes]
    if together and len(share) * state.num_processes < len(batches):
        share.append(batches[-1])  # once more, so that nobody waits
    scorer = _Scorer(model, device, layout, autocast, padding_id, halves=not together)
    # A process that left at once would leave the others waiting here, for good.
    parts_of_all = gather_object([_compute(scorer, share, policy, cache, progress, stopping)])
    if any(stopped for _, stopped in parts_of_all):
        raise ScoringStopped
    for part, _ in parts_of_all:
        scores.update(part)
        if state.is_main_process and state.num_processes > 1:  # others may write to a disk of their own
            cache.write(policy, list(part), list(part.values()))
    return FrozenScores(
        logps=[[scores[key] for key in listed] for listed in keys],
        responses=len(unique),
        computed=sum(len(names) for names, _ in missing),
        tokens=sum(example.tokens for batch in share for _, example in batch),
        seconds=time.perf_counter() - start,
    )


_Missing = tuple[list[bytes], Example]
"""Keys of the responses that are to be scored, and these responses with their prompt."""


def _missing(
    examples: Sequence[Example], keys: Sequence[Sequence[bytes]], scores: dict[bytes, float]
) -> list[_Missing]:
    """Responses without a score, those to the same prompt together, each once; the longest first."""
    groups: dict[bytes, tuple[Any, dict[bytes, Any]]] = {}
    for example, listed in zip(examples, keys, strict=True):
        for key, response in zip(listed, example.responses, strict=True):
            if key not in scores:
                prompt = np.asarray(example.prompt, dtype=np.int32).tobytes()
                groups.setdefault(prompt, (example.prompt, {}))[1][key] = response
    missing = [
        (list(responses), Example(prompt, list(responses.values()))) for prompt, responses in groups.values()
    ]
    return sorted(missing, key=lambda each: -each[1].tokens)


def _parts(group: _Missing, layout: Layout, budget: int) -> Iterator[_Missing]:
    """The responses to one prompt, in as many parts as it takes: any number of rows may have the same prompt."""
    names, example = group
    part: _Missing = ([], Example(example.prompt, []))
    for name, response in zip(names, example.responses, strict=True):
        grown = ([*part[0], name], Example(example.prompt, [*part[1].responses, response]))
        if part[0] and _size([grown], layout) > budget:
            yield part
            grown = ([name], Example(example.prompt, [response]))
        part = grown
    yield part


def _batches(
    missing: Sequence[_Missing], layout: Layout, budget: int, most: int | None
) -> Iterator[list[_Missing]]:
    """Runs of the list that fit."""
    batch: list[_Missing] = []
    tokens = rows = widest = 0
    for names, example in missing:
        tokens, rows = tokens + example.tokens, rows + len(names)
        widest = max(widest, example.longest)
        if batch and ((tokens if layout.way else rows * widest) > budget or len(batch) == most):
            yield batch
            batch, tokens, rows, widest = [], example.tokens, len(names), example.longest
        batch.append((names, example))
    if batch:
        yield batch


def _size(batch: Sequence[_Missing], layout: Layout) -> int:
    """Tokens that a batch puts through the model."""
    examples = [example for _, example in batch]
    if layout.way is not None:
        return sum(example.tokens for example in examples)
    return max(e.longest for e in examples) * sum(len(e.responses) for e in examples)


@dataclass(frozen=True)
class _Scorer:
    """A model with all that it takes to score a batch with it."""

    model: nn.Module
    device: torch.device
    layout: Layout
    autocast: Callable[[], AbstractContextManager[Any]]
    padding_id: int
    halves: bool = True

    def logps(self, batch: Sequence[_Missing]) -> dict[bytes, float]:
        """Log-probabilities by key; a batch that is too much for the device's memory is halved.

        Raises:
            PrefoptError: even one prompt with its responses is too much.
        """
        try:
            return self._at_once(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1 or not self.halves:
                what = "a single prompt" if len(batch) == 1 else f"{len(batch)} prompts"
                raise PrefoptError(
                    f"The accelerator's memory is exhausted while scoring with the reference policy, with {what} of "
                    f"{sum(example.tokens for _, example in batch)} tokens with the responses. A smaller "
                    "training.precompute_ref_batch_size, a shorter dataset.max_length, a smaller model or a "
                    "half-precision one need less."
                ) from error
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        return {**self.logps(batch[:middle]), **self.logps(batch[middle:])}

    def _at_once(self, batch: Sequence[_Missing]) -> dict[bytes, float]:
        tensors = self.layout.batch([example for _, example in batch], self.padding_id)
        with torch.no_grad(), self.autocast():
            inputs = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            logps = score_responses(self.model, inputs, self.layout).logps.tolist()
        return dict(zip(_response_major([names for names, _ in batch]), logps, strict=True))


def _compute(
    scorer: _Scorer,
    batches: Sequence[Sequence[_Missing]],
    policy: Policy,
    cache: ScoreCache,
    progress: Progress | None,
    stopping: Callable[[], bool],
) -> tuple[dict[bytes, float], bool]:
    """Score batches, until asked to stop, and keep the scores; returns them by key, and whether it was asked."""
    scores: dict[bytes, float] = {}
    stopped = False
    total = len(_keys(batches))
    training = scorer.model.training
    scorer.model.eval()
    try:
        for batch in batches:
            done = scorer.logps(batch)
            cache.write(policy, list(done), list(done.values()))
            scores.update(done)
            if progress:
                progress(len(scores), total)
            if stopped := stopping():
                break
    finally:
        scorer.model.train(training)
    return scores, stopped


def _keys(batches: Sequence[Sequence[_Missing]]) -> set[bytes]:
    return {name for batch in batches for names, _ in batch for name in names}


def _response_major(names: Sequence[Sequence[bytes]]) -> list[bytes]:
    """The keys in the order in which a batch counts its responses."""
    most = max(map(len, names))
    return [listed[branch] for branch in range(most) for listed in names if branch < len(listed)]


def _broadcast(values: np.ndarray | None) -> np.ndarray:
    """The main process's array in every process."""
    held = [values]
    broadcast_object_list(held, from_process=0)
    assert held[0] is not None
    return held[0]
