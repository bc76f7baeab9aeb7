"""The policy's own responses during training: drawn now and then, used until the next draw.

Everything about a draw follows from the seed, the optimizer step and the weights of that step. The random stream is
its own, and a checkpoint holds the samples in use, so that a resumed run goes on bit for bit.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from prefopt_cli.recipe.schema import Regularizer
from prefopt_cli.runs import metrics
from prefopt_cli.scoring.forward import SampleScores, reference_states, score_samples
from prefopt_cli.scoring.head import HeadStates
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.row_metrics import RowMetrics
from prefopt_cli.training.sampling import sample_responses
from prefopt_cli.training.sampling_prompts import SamplingPrompts

if TYPE_CHECKING:
    from prefopt_cli.training.trainer import PreferenceTrainer

KEPT = 3
"""Samples of each draw that go to the run folder."""

PROMPTS, DRAW = 1, 2
"""Purposes of random numbers: one must not disturb the other."""


@dataclass(frozen=True)
class Group:
    """Samples that go through the policy together, and what the reference says about them."""

    batch: dict[str, Tensor]
    reference: HeadStates
    cut_off: Tensor
    """(K,) 1 where a response ran into the limit, else 0."""


@dataclass(frozen=True)
class Sample:
    """One response of the policy."""

    row: int
    """Position of its prompt among the sampling prompts."""
    tokens: list[int]
    """With the token that ended it, unless it ran into the limit."""


class SampleWindow:
    """The samples of one process: drawn every `sample_every` optimizer steps, reused in between.

    Args:
        trainer: whose policy writes, and whose reference is asked; it must be complete but for this.
        settings: the recipe's regularizer.
        sampling: what the policy is asked, the same in every process.
        stop_ids: tokens that end a response.
        file: where the first samples of a draw are kept; None keeps none.
    """

    def __init__(
        self,
        trainer: "PreferenceTrainer",
        settings: Regularizer,
        sampling: SamplingPrompts,
        *,
        stop_ids: Sequence[int],
        file: Path | None,
    ) -> None:
        self._trainer = trainer
        self._settings = settings
        self._prompts = sampling.rows
        self._max_new_tokens = sampling.max_new_tokens
        self._stop_ids = tuple(stop_ids)
        self._file = file
        self._drawn_at: int | None = None
        self._samples: list[Sample] = []
        self._groups: list[Group] = []
        self._turn = (-1, 0)
        self._begun: float | None = None
        self._spent = 0.0

    @property
    def size(self) -> int:
        """Samples of a draw."""
        return self._settings.num_prompts

    @property
    def time_share(self) -> float:
        """Share of this session's training time, evaluations included, that went into samples and what the reference
        says about them, in [0, 1]; what they cost in every step is not in it."""
        return 0.0 if self._begun is None else self._spent / max(time.monotonic() - self._begun, 1e-9)

    def begin(self, step: int) -> None:
        """Begin a micro-batch of an optimizer step: draw where it is time to."""
        self._turn = (step, self._turn[1] + 1 if self._turn[0] == step else 0)
        self._begun = self._begun or time.monotonic()
        if self._drawn_at is None or step >= self._drawn_at + self._settings.sample_every:
            self._draw(step)
        if not self._groups:
            begun = time.monotonic()
            self._groups = self._prepared()
            self._spent += time.monotonic() - begun

    def groups(self, micro_batches: int) -> list[Group]:
        """The groups of the micro-batch that has begun; over the `micro_batches` of a step each comes once."""
        return self._groups[self._turn[1] :: micro_batches]

    def score(self, model: nn.Module, group: Group) -> SampleScores:
        """What the policy and the reference say about a group's responses."""
        return score_samples(model, group.batch, self._trainer.layout, group.reference)

    def metrics(self, group: Group, scores: SampleScores, divergences: Tensor) -> RowMetrics:
        """Per response: KL to the reference and entropy (nats, summed over its tokens), tokens, whether cut off."""
        ones = torch.ones_like(divergences)
        return {
            "kl/ref": (divergences.detach(), ones),
            "entropy/sampled": (scores.entropy.sum(1), ones),
            "sample/length": (scores.mask.sum(1), ones),
            "sample/cut_off": (group.cut_off, ones),
        }

    def state(self) -> dict[str, Any]:
        """The samples of every process, for a checkpoint; every process must call it."""
        own = [[sample.row, sample.tokens] for sample in self._samples]
        return {"drawn_at": self._drawn_at, "by_process": gather_object([own])}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up this process's samples of a checkpoint; other ones are drawn where other processes wrote it."""
        if len(state["by_process"]) != self._trainer.args.world_size:
            return
        own = state["by_process"][self._trainer.args.process_index]
        self._drawn_at = state["drawn_at"]
        self._samples = [Sample(row, tokens) for row, tokens in own]
        self._groups = []

    def _draw(self, step: int) -> None:
        """New samples from the policy as it is."""
        trainer, settings = self._trainer, self._settings
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()  # the work of earlier steps is not sampling
        begun = time.monotonic()
        rows = self._due_rows(step // settings.sample_every)
        responses = sample_responses(
            trainer.model,
            [self._prompts[row]["prompt_ids"] for row in rows],
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._stop_ids,
            padding_id=trainer.padding_id,
            seed=self._seed(DRAW, step, trainer.args.process_index),
            autocast=trainer.accelerator.autocast,
        )
        self._samples = [Sample(row, tokens) for row, tokens in zip(rows, responses, strict=True)]
        self._drawn_at, self._groups = step, []
        self._keep(step)
        self._spent += time.monotonic() - begun

    def _due_rows(self, draw: int) -> list[int]:
        """Prompts of this process's part of a draw: all prompts in random order, then all in another order, ..."""
        args = self._trainer.args
        first = (draw * args.world_size + args.process_index) * self.size
        places = [divmod(position, len(self._prompts)) for position in range(first, first + self.size)]
        orders = {number: self._order(number) for number, _ in places}
        return [int(orders[number][place]) for number, place in places]

    def _order(self, number: int) -> np.ndarray:
        return np.random.default_rng(self._seed(PROMPTS, number)).permutation(len(self._prompts))

    def _seed(self, *purpose: int) -> int:
        return int(np.random.SeedSequence([self._trainer.args.seed, *purpose]).generate_state(1)[0])

    def _prepared(self) -> list[Group]:
        """As many groups as a step has micro-batches, or as there are samples."""
        trainer = self._trainer
        count = min(trainer.args.gradient_accumulation_steps, len(self._samples))
        groups = []
        for number in range(count):
            own = self._samples[number::count]
            examples = [Example(self._prompts[each.row]["prompt_ids"], (each.tokens,)) for each in own]
            batch = trainer.layout.batch(examples, trainer.padding_id, trainer.args.pad_to_multiple_of)
            device = trainer.accelerator.device
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            cut_off = torch.tensor([float(not self._ended(each)) for each in own], device=device)
            with trainer.reference_policy() as reference:
                groups.append(Group(batch, reference_states(reference, batch, trainer.layout), cut_off))
        return groups

    def _ended(self, sample: Sample) -> bool:
        return sample.tokens[-1] in self._stop_ids

    def _keep(self, step: int) -> None:
        """Write the first samples to the run folder, under the number of the step that they are first used in."""
        if self._file is None or not self._trainer.is_world_process_zero():
            return
        tokenizer = self._trainer.processing_class
        for sample in self._samples[:KEPT]:
            prompt = self._prompts[sample.row]
            record = {
                "step": step + 1,
                "row_id": prompt["row_id"],
                "prompt": tokenizer.decode(prompt["prompt_ids"]),
                "response": tokenizer.decode(sample.tokens),
                "tokens": len(sample.tokens),
                "ended": self._ended(sample),
            }
            metrics.append(self._file, record)
