"""A policy's replies to held-out prompts, each with its gold rewards."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.data.examples import Progress
from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import near_folder
from prefopt_cli.recipe.schema import ModelSettings
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.sandbox.grammar import Prompt, parse_reply
from prefopt_cli.sandbox.names import DIMENSIONS
from prefopt_cli.sandbox.origin import BASE, is_base, origin
from prefopt_cli.sandbox.policies import load_policy, locate
from prefopt_cli.sandbox.preferences import text_rewards
from prefopt_cli.sandbox.sampling import sample_replies
from prefopt_cli.sandbox.world import open_world


@dataclass(frozen=True)
class Reply:
    """One reply and what it is worth in every dimension."""

    text: str
    well_formed: bool
    rewards: dict[str, float]


@dataclass(frozen=True)
class Answered:
    """A prompt and a policy's replies to it."""

    prompt: Prompt
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Answers:
    """Several prompts with their replies."""

    prompts: tuple[Answered, ...]

    @property
    def replies(self) -> list[Reply]:
        return [reply for one in self.prompts for reply in one.replies]

    @property
    def well_formed(self) -> float:
        """Share of the replies that are well-formed."""
        return sum(reply.well_formed for reply in self.replies) / len(self.replies)

    @property
    def means(self) -> dict[str, float]:
        """Mean gold reward by dimension, replies that are not well-formed included."""
        return {
            name: sum(reply.rewards[name] for reply in self.replies) / len(self.replies)
            for name in DIMENSIONS
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        prompts = [
            {**asdict(one.prompt), "replies": [asdict(r) for r in one.replies]} for one in self.prompts
        ]
        return {"prompts": prompts, "well_formed": self.well_formed, "means": self.means}


def answers(
    policy: str, prompts: int, per_prompt: int, *, seed: int, progress: Progress | None = None
) -> Answers:
    """``per_prompt`` replies to each of the first ``prompts`` held-out prompts of the policy's world.

    Args:
        policy: ``sandbox:base``, a run folder, or the folder of a model that speaks the sandbox's language.
        prompts: how many prompts.
        per_prompt: how many replies to each.
        seed: of the sampling.
        progress: told of the work; a world that has not been made is made.

    Raises:
        UserError: there is no such policy, its tokenizer is not the sandbox's, or there are not so many prompts.
    """
    _require(policy, progress)
    seed_of_world = _world_seed(policy)
    model, tokenizer = load_policy(policy)
    world = open_world(seed_of_world, progress=progress)
    asked = [row.prompt for row in world.pool("test")]
    if prompts > len(asked):
        raise UserError(f"The sandbox has {len(asked)} held-out prompts, not {prompts}.")
    samples = sample_replies(model, tokenizer, asked[:prompts], per_prompt, seed=seed, progress=progress)
    return Answers(
        tuple(
            Answered(drawn[0].prompt, tuple(_reply(drawn[0].prompt, each.text) for each in drawn))
            for drawn in samples
        )
    )


def _require(policy: str, progress: Progress | None) -> None:
    """Refuse what is no policy, before a world is made for it; make the world where the policy is part of it."""
    if not policy:
        raise UserError(f"The policy has no name; write {BASE} or a run folder.")
    source = locate(ModelSettings(name_or_path=policy), progress)
    # The hub has no policies of the sandbox, which needs no network.
    if not source.is_local:
        raise UserError(
            f"There is no folder {source.weights} in {Path.cwd()}.{near_folder(Path(source.weights))} "
            f"Name {BASE} or a run folder."
        )


def _world_seed(policy: str) -> int:
    """The world that the policy comes from; of a folder that is no run nothing tells, and it is that of seed 0."""
    if not is_base(policy) and not RunFolder(Path(policy).expanduser()).is_run():
        return 0
    return origin(policy).seed


def _reply(prompt: Prompt, text: str) -> Reply:
    return Reply(text, parse_reply(prompt, text) is not None, text_rewards(prompt, text))
