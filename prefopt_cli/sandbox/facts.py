"""What there is to say about a world: its prompts, replies and rewards, and, once it is made, its rows and labels."""

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from prefopt_cli import __version__
from prefopt_cli.sandbox.grammar import (
    CHOICES,
    PROBLEMS,
    Choice,
    Prompt,
    draw_prompts,
    number_of_prompts,
    reply_text,
)
from prefopt_cli.sandbox.names import DIMENSIONS, SPLITS, PreferencesName
from prefopt_cli.sandbox.preferences import pairs, text_rewards
from prefopt_cli.sandbox.rewards import gold_rewards, malformed_reward, reward_range, reward_table
from prefopt_cli.sandbox.settings import STANDARD, WorldSettings
from prefopt_cli.sandbox.world import LIBRARIES, PoolRow, World, find_world, world_folder


@dataclass(frozen=True)
class Scored:
    """A reply and its gold reward in one dimension."""

    reply: str
    reward: float


@dataclass(frozen=True)
class Dimension:
    """One gold reward over all well-formed replies."""

    meaning: str
    least: float
    most: float
    levels: int
    """How many different values there are."""
    malformed: float
    """What a text is worth that is no well-formed reply."""
    best: Scored
    worst: Scored
    """Replies to the example prompt."""


@dataclass(frozen=True)
class Labels:
    """The held-out pairs of one dimension at temperature 1: their rewards, and how far their labels follow them."""

    mean: float
    std: float
    """Gold reward of the base policy's replies."""
    agree: float
    equal: float
    """Shares of the pairs whose chosen reply has the higher gold reward, and of those worth the same."""

    @property
    def best_accuracy(self) -> float:
        """What a policy that knows the gold reward gets, which guesses between replies worth the same."""
        return self.agree + self.equal / 2


@dataclass(frozen=True)
class Rows:
    """How much preference data a split has; each dimension labels the same replies in its own way."""

    prompts: int
    pairs: int
    lists: int
    list_length: int


@dataclass(frozen=True)
class Facts:
    """A world in numbers and examples; what only a finished world can tell is empty before."""

    seed: int
    folder: Path
    bytes: int | None
    """Size on disk; None if the world has not been made."""
    versions: dict[str, str]
    prompts: int
    replies: int
    example: str
    dimensions: dict[str, Dimension]
    conflicts: dict[str, float]
    """``first/second``: share of reply pairs in which one reply is better in one dimension, worse in the other."""
    rows: dict[str, Rows]
    """Before the world is made: at most so many."""
    labels: dict[str, Labels]

    @property
    def is_built(self) -> bool:
        return self.bytes is not None

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        labels = {
            name: {**asdict(one), "best_accuracy": one.best_accuracy} for name, one in self.labels.items()
        }
        return {**asdict(self), "folder": str(self.folder), "built": self.is_built, "labels": labels}


def describe(seed: int, settings: WorldSettings = STANDARD) -> Facts:
    """Facts of a world as far as they are known; nothing is built."""
    world = find_world(seed, settings)
    (example,) = draw_prompts(1, Random(seed))
    return Facts(
        seed=seed,
        folder=world_folder(seed, settings),
        bytes=folder_bytes(world.folder) if world else None,
        versions={"prefopt": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}},
        prompts=number_of_prompts(),
        replies=len(CHOICES),
        example=example.text,
        dimensions={name: _dimension(name, example) for name in DIMENSIONS},
        conflicts={
            f"{first}/{second}": conflict_share(first, second)
            for first, second in itertools.combinations(DIMENSIONS, 2)
        },
        rows={split: _rows(split, world, settings) for split in SPLITS},
        labels=dict(_labels(world)) if world else {},
    )


def folder_bytes(folder: Path) -> int:
    """Size of everything in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def conflict_share(first: str, second: str) -> float:
    """Share of all pairs of different replies to a prompt on which two dimensions disagree.

    They disagree where one reply is better in the first dimension and worse in the second. The problems of the
    prompts are equally frequent.
    """
    shares = []
    for problem in PROBLEMS:
        both = np.stack([reward_table(problem, first), reward_table(problem, second)], axis=1)
        # Replies that are worth the same in both are counted together: hundreds of rows instead of thousands.
        values, counts = np.unique(both.round(6), axis=0, return_counts=True)
        order = np.sign(values[:, None, :] - values[None, :, :]).prod(axis=2)
        disagreeing = np.outer(counts, counts)[order < 0].sum()
        shares.append(disagreeing / (len(both) * (len(both) - 1)))
    return float(np.mean(shares))


def _dimension(name: str, example: Prompt) -> Dimension:
    least, most = reward_range(name)
    values = {float(value) for problem in PROBLEMS for value in reward_table(problem, name).round(6)}
    table = reward_table(example.problem, name)
    return Dimension(
        meaning=DIMENSIONS[name],
        least=least,
        most=most,
        levels=len(values),
        malformed=malformed_reward(name),
        best=_scored(example, CHOICES[int(table.argmax())], name),
        worst=_scored(example, CHOICES[int(table.argmin())], name),
    )


def _scored(prompt: Prompt, choice: Choice, dimension: str) -> Scored:
    return Scored(reply_text(prompt, choice), gold_rewards(prompt, choice)[dimension])


def _rows(split: str, world: World | None, settings: WorldSettings) -> Rows:
    planned = {"train": settings.train_prompts, "test": settings.test_prompts}
    count = len(world.pool(split)) if world else planned[split]
    return Rows(
        prompts=count, pairs=count * (settings.replies // 2), lists=count, list_length=settings.replies
    )


def _labels(world: World) -> Iterator[tuple[str, Labels]]:
    pool = world.pool("test")
    gold = [text_rewards(row.prompt, reply) for row in pool for reply in row.replies]
    for name in DIMENSIONS:
        rewards = np.array([each[name] for each in gold])
        yield name, Labels(float(rewards.mean()), float(rewards.std()), *_agreement(pool, world.seed, name))


def _agreement(pool: Sequence[PoolRow], seed: int, dimension: str) -> tuple[float, float]:
    """Shares of pairs whose label follows the gold reward, and of those whose replies are worth the same."""
    name = PreferencesName(dimension, seed=seed)
    ahead = [
        row["chosen_gold"][dimension] - row["rejected_gold"][dimension] for row in pairs(pool, "test", name)
    ]
    return float(np.mean([each > 0 for each in ahead])), float(np.mean([each == 0 for each in ahead]))
