"""Training steps of several trainers in one process, in turn: A B C A B C ... on the same batches.

Every trainer runs its own `train()`, in a thread of its own, and may go on only while it is its turn. A turn begins
and ends where the trainer is about to begin a step, so it holds all that a step costs: forward and backward pass,
clipping, optimizer, scheduler, callbacks, metrics, logging, and fetching and collating a batch.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import DPOTrainer

from benchmarks.throughput_peers import OURS, PEERS, PRECOMPUTED, build_trainer
from benchmarks.throughput_subject import PairSet, Subject, synchronize, useful_flops, useful_tokens

FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "mixed": 5e-2, "bfloat16": 5e-2}
TRAJECTORY_TOLERANCE = {"float32": 1e-3, "mixed": 1e-1, "bfloat16": 1e-1}
"""Largest difference of one batch's loss between prefopt and TRL, at the first step and at any."""

RESAMPLES = 2000


@dataclass
class Passes:
    """Forward passes of a model and the tokens (padding and all) that entered it."""

    tokens: int = 0
    count: int = 0

    def watch(self, model: nn.Module) -> "Passes":
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.tokens += inputs[0].numel()
            self.count += 1

        model.get_input_embeddings().register_forward_pre_hook(note)
        return self


@dataclass
class Steps:
    """What was measured, one entry per step."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    policy_tokens: list[int] = field(default_factory=list)
    reference_tokens: list[int] = field(default_factory=list)
    reference_passes: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    threads: int = 0


class Runner(TrainerCallback):
    """A trainer that goes on for one step at a time."""

    def __init__(self, name: str, trainer: DPOTrainer, device: str) -> None:
        self.name, self.trainer, self.device = name, trainer, device
        self.steps = Steps()
        self._policy = Passes().watch(trainer.model)
        self._reference = Passes().watch(trainer.ref_model) if trainer.ref_model else Passes()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._began: float | None = None
        self._processor_began = 0.0
        self._before = (0, 0, 0)
        trainer.training_step = self._noting_losses(trainer.training_step)
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)

    def start(self) -> None:
        """To the point where the first step would begin."""
        self._thread.start()
        self._wait()

    def turn(self) -> None:
        """One step; after the last one to the end of training."""
        self._go.release()
        self._wait()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """In the trainer's thread: the turn is over."""
        synchronize(self.device)
        now, processor = time.perf_counter(), time.process_time()  # nobody else has work to do meanwhile
        counts = (self._policy.tokens, self._reference.tokens, self._reference.count)
        if self._began is None:
            self.steps.threads = torch.get_num_threads()
        else:
            policy, reference, passes = np.subtract(counts, self._before).tolist()
            self.steps.seconds.append(now - self._began)
            self.steps.processor_seconds.append(processor - self._processor_began)
            self.steps.policy_tokens.append(policy)
            self.steps.reference_tokens.append(reference)
            self.steps.reference_passes.append(passes)
        self._before = counts
        self._done.release()
        self._go.acquire()
        self._began, self._processor_began = time.perf_counter(), time.process_time()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error:
            raise RuntimeError(f"{self.name} failed") from self._error

    def _noting_losses(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self.steps.losses.append(loss.detach())
            return loss

        return noted


def pairs_needed(batch: int, rounds: int, warmup: int) -> int:
    """A step more ends the last turn, and no trainer may come to its last batch, which accelerate treats otherwise."""
    return batch * (warmup + rounds + 3)


def measure(
    subject: Subject,
    folder: Path,
    pairs: PairSet,
    scores: Mapping[str, Sequence[float]],
    *,
    batch: int,
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """One configuration: all peers on the same batches, round by round."""
    count = pairs_needed(batch, rounds, warmup)
    chosen = PairSet(pairs.name, pairs.path, pairs.rows[:count], pairs.tokens.select(range(count)))
    runners, setup = [], {}
    for name in PEERS:
        trainer = build_trainer(name, subject, folder, chosen, scores, batch=batch, steps=warmup + rounds + 1)
        runners.append(Runner(name, trainer, subject.device))
        setup[name] = getattr(trainer, "precompute_seconds", 0.0)
    for runner in runners:
        runner.start()
    for _ in range(warmup + rounds):
        for runner in runners:
            runner.turn()
    for runner in runners:  # the step that nobody measures, and the end
        runner.turn()
    steps = {runner.name: runner.steps for runner in runners}
    shapes = np.array(chosen.shapes)[: batch * (warmup + rounds)].reshape(warmup + rounds, batch, 3)[warmup:]
    flops = [sum(useful_flops(subject, tuple(shape)) for shape in each) for each in shapes.tolist()]
    return {
        "pairs": pairs.name,
        "batch": batch,
        "rounds": rounds,
        "warmup": warmup,
        "useful_tokens": [sum(useful_tokens(tuple(shape)) for shape in each) for each in shapes.tolist()],
        "useful_flops": flops,
        "peers": {name: _figures(each, warmup, flops) for name, each in steps.items()},
        "speedup": {name: _ratios(steps[name], steps[OURS], warmup) for name in PEERS if name != OURS},
        "losses": _agreement(steps, subject.dtype),
        "trl_precompute_seconds": setup[PRECOMPUTED],
        "trl_precompute_pairs": count,
    }


def _figures(steps: Steps, warmup: int, flops: Sequence[float]) -> dict[str, Any]:
    seconds = steps.seconds[warmup:]
    return {
        "median_seconds": float(np.median(seconds)),
        "mean_seconds": float(np.mean(seconds)),
        "flops_per_second": sum(flops) / sum(seconds),
        "policy_tokens": steps.policy_tokens[warmup:],
        "reference_tokens": steps.reference_tokens[warmup:],
        "reference_passes": steps.reference_passes[warmup:],
        "seconds": seconds,
        "processor_seconds": steps.processor_seconds[warmup:],
        "losses": [float(loss) for loss in steps.losses[: len(steps.seconds)]],
        "threads": steps.threads,
    }


def _ratios(other: Steps, ours: Steps, warmup: int) -> dict[str, float]:
    """The other's time over ours on the same batch: median, its 95 % bootstrap interval, spread, totals."""
    ratios = np.array(other.seconds[warmup:]) / np.array(ours.seconds[warmup:])
    resampled = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return {
        "median": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "p10": float(np.quantile(ratios, 0.1)),
        "p90": float(np.quantile(ratios, 0.9)),
        "total": sum(other.seconds[warmup:]) / sum(ours.seconds[warmup:]),
        "processor": sum(other.processor_seconds[warmup:]) / sum(ours.processor_seconds[warmup:]),
    }


def _agreement(steps: Mapping[str, Steps], dtype: str) -> dict[str, Any]:
    """Whether the peers do the same work, warm-up included."""
    losses = {name: np.array([float(loss) for loss in each.losses]) for name, each in steps.items()}
    first = [each[0] for each in losses.values()]
    spread = float(max(first) - min(first))
    apart = float(np.abs(losses[OURS] - losses[PRECOMPUTED]).max())
    return {
        "first": float(losses[OURS][0]),
        "last": float(losses[OURS][-1]),
        "first_spread": spread,
        "trajectory_difference": apart,
        "first_agrees": spread <= FIRST_LOSS_TOLERANCE[dtype],
        "trajectory_agrees": apart <= TRAJECTORY_TOLERANCE[dtype],
    }
