"""Replies that policies write to the same prompts, with the same random numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt_cli.data.examples import Text, text_key
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.asking import Reader
from prefopt_cli.evaluation.targets import NO_REFERENCE, find_target
from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.batches import padding_id
from prefopt_cli.training.frozen_policies import loaded, precision
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.row_text import text_after
from prefopt_cli.training.sampling import sample_responses

REFERENCE = "reference"
"""Names the policy that a run began with."""


class SamplingStopped(Exception):
    """A signal came while replies were written."""


@dataclass(frozen=True)
class Drawing:
    """How replies are drawn."""

    per_prompt: int = 1
    temperature: float = 1.0
    """0: the likeliest token every time."""
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    """Replies that are written together; up to rounding it has no say in them."""

    def require_finite(self) -> None:
        """Raise UserError where the temperature is no number."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: a number from 0 on, such as 0.7.")

    def require_different_replies(self) -> None:
        """Raise UserError where several replies to a prompt could only be the same."""
        if self.per_prompt > 1 and self.temperature == 0:
            raise UserError(
                f"--per-prompt {self.per_prompt}: at temperature 0 all replies to a prompt are the same one. Leave it "
                "out, or raise --temperature."
            )

    def seed_of(self, prompt: Text, number: int) -> int:
        """Of one reply: it depends on nothing but the prompt and the reply's number, so all policies share it."""
        return int.from_bytes(text_key(self.seed, prompt, number)[:8], "little") >> 1


@dataclass(frozen=True)
class Reply:
    """What a policy wrote."""

    text: str
    tokens: int
    """With the one that ended it."""
    finished: bool
    """Whether it ended by itself; else it was cut off."""


@dataclass(frozen=True)
class Writer:
    """A policy that writes replies."""

    name: str
    source: PolicySource
    recipe: Recipe
    """How it is loaded."""
    run: RunFolder | None = None
    run_id: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The one beside the policy."""
        return loading.load_tokenizer(self.source, self.recipe.model)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        return loading.load_config(self.source, self.recipe.model)

    @property
    def reader(self) -> Reader:
        """What turns prompts into its tokens."""
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return Reader(self.tokenizer, context)

    @property
    def knows_chats(self) -> bool:
        """Whether it is of a run that was trained on chats."""
        if self.run is None:
            return False
        found = self.run.read_manifest().get("receipt", {}).get("special_tokens", {})
        return "end_of_turn" in found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "description": self.source.describe(),
            "run": str(self.run.path) if self.run else None,
            "run_id": self.run_id,
        }


def find_writers(name: str, against: str | None, reporter: Reporter, runs: RunFinder) -> list[Writer]:
    """The policy that is asked, and the one beside it, if there is to be one.

    Args:
        name: run folder, folder of a model or an adapter, hub id, or a scheme's name.
        against: the same for the other policy; `REFERENCE` for the one that the run began with.
        reporter: told of long work.
        runs: finds runs that were moved.

    Raises:
        UserError: one is not there.
    """
    beside = against == REFERENCE
    target = find_target(name, reporter, runs, reference=None if beside else NO_REFERENCE, key="RUN")
    own = Writer(name, target.source, target.recipe, target.run, target.run_id)
    if against is None:
        return [own]
    if beside:
        if target.reference is None:
            raise UserError(
                f"--against {REFERENCE}: {name} is a model, not a run, so nothing tells what it began with. Name the "
                "other policy."
            )
        return [own, Writer(REFERENCE, target.reference, target.recipe)]
    found = find_target(against, reporter, runs, reference=NO_REFERENCE, key="--against")
    label = f"{against} (2)" if against == name else against
    return [own, Writer(label, found.source, found.recipe, found.run, found.run_id)]


def draw(
    writer: Writer,
    prompts: Sequence[Text],
    ids: Sequence[list[int]],
    drawing: Drawing,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    reporter: Reporter,
    stopping: Callable[[], bool] = lambda: False,
) -> list[list[Reply]]:
    """Replies to every prompt; the policy is loaded for it, and gone afterwards.

    Args:
        writer: the policy.
        prompts: as text, for the seeds.
        ids: the same in tokens.
        drawing: how many, and how.
        max_new_tokens: a longer reply is cut off.
        stop_ids: tokens that end a reply.
        reporter: told of progress.
        stopping: whether a signal has asked to stop.

    Raises:
        UserError: the policy cannot be loaded.
        SamplingStopped: a signal came.
    """
    rows = [(place, number) for place in range(len(prompts)) for number in range(drawing.per_prompt)]
    args = training_arguments(writer.recipe, writer.run or RunFolder(Path("unused")), evaluates=False)
    found: list[list[Reply]] = [[] for _ in prompts]
    with loaded(writer.source, writer.recipe, args) as model:
        for start in range(0, len(rows), drawing.batch_size):
            if stopping():
                raise SamplingStopped
            batch = rows[start : start + drawing.batch_size]
            responses = sample_responses(
                model,
                [ids[place] for place, _ in batch],
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                padding_id=padding_id(writer.tokenizer, writer.config),
                seed=[drawing.seed_of(prompts[place], number) for place, number in batch],
                temperature=drawing.temperature,
                top_p=drawing.top_p,
                autocast=precision(args),
            )
            for (place, _), tokens in zip(batch, responses, strict=True):
                found[place].append(_reply(writer.tokenizer, ids[place], tokens, stop_ids))
            reporter.progress(f"sampling {writer.name}", start + len(batch), len(rows))
    return found


def _reply(tokenizer: Any, prompt: list[int], tokens: list[int], stop_ids: Sequence[int]) -> Reply:
    finished = tokens[-1] in stop_ids
    text = text_after(tokenizer, prompt, tokens[:-1] if finished else tokens)
    return Reply(text, len(tokens), finished)
