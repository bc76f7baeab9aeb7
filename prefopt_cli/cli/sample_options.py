"""Options of `prefopt sample` that must fit together, and the judge that they describe."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt_cli.errors import UserError

if TYPE_CHECKING:
    from prefopt_cli.evaluation.judges.judging import Judge
    from prefopt_cli.evaluation.judges.pace import Patience

REWARD_MODEL, OPENAI = "reward-model", "openai"

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeOptions:
    """What was said about the judge; None where nothing was."""

    judge: str | None
    url: str | None
    prompt: Path | None
    concurrency: int | None
    per_minute: float | None
    timeout: float | None
    retries: int | None

    @property
    def kind(self) -> str:
        """What stands before the colon."""
        return (self.judge or "").partition(":")[0]

    @property
    def name(self) -> str:
        """What stands after it."""
        return (self.judge or "").partition(":")[2]

    def require_meaning(self) -> None:
        """Refuse, before anything is loaded, a judge of no known kind, and options that it has no use for.

        Raises:
            UserError: see above.
        """
        if self.judge is not None and (self.kind not in (REWARD_MODEL, OPENAI) or not self.name):
            raise UserError(
                f"--judge {self.judge}: write {REWARD_MODEL}:PATH_OR_ID for a reward model, or {OPENAI}:MODEL for a "
                "model behind a server."
            )
        if self.kind == OPENAI and not self.url:
            raise UserError(
                f"--judge {self.judge}: name its server with --judge-url, such as http://localhost:8000/v1."
            )
        for option, value in {
            "--judge-url": self.url,
            "--judge-prompt": self.prompt,
            "--judge-concurrency": self.concurrency,
            "--judge-rpm": self.per_minute,
            "--judge-timeout": self.timeout,
            "--judge-retries": self.retries,
        }.items():
            if self.kind != OPENAI and value is not None:
                raise UserError(f"{option} is for --judge {OPENAI}:MODEL; leave it out, or name that judge.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option} {value:g}: this is no number that can be used.")

    def patience(self) -> "Patience":
        """How the server is asked."""
        from prefopt_cli.evaluation.judges.pace import Patience

        usual = Patience()
        return Patience(
            usual.retries if self.retries is None else self.retries,
            timeout=usual.timeout if self.timeout is None else self.timeout,
            per_minute=self.per_minute,
            concurrency=usual.concurrency if self.concurrency is None else self.concurrency,
        )

    def open(self) -> "Judge | None":
        """The judge, with nothing heavy loaded and nothing asked.

        Raises:
            UserError: it cannot be used.
        """
        if self.judge is None:
            return None
        if self.kind == REWARD_MODEL:
            from prefopt_cli.evaluation.judges.reward_model import RewardModelJudge

            return RewardModelJudge(self.name)
        from prefopt_cli.evaluation.judges.openai import OpenAIJudge
        from prefopt_cli.evaluation.judges.rubric import read_rubric

        return OpenAIJudge(
            self.name,
            self.url or "",
            key=os.environ.get(KEY_VARIABLE),
            rubric=read_rubric(self.prompt),
            patience=self.patience(),
        )


def require_loose(chat: bool | None, prompts: str | None, are_loose: bool) -> None:
    """Refuse --chat and --no-chat for prompts of data sets, which say themselves what they are.

    Args:
        chat: what was said, if anything was.
        prompts: the option of this name.
        are_loose: whether they are from the command line or a .txt file.

    Raises:
        UserError: see above.
    """
    if chat is not None and not are_loose:
        where = prompts or "the run's held-out sets"
        raise UserError(
            f"{'--chat' if chat else '--no-chat'} is for prompts from the command line or a .txt file; those of "
            f"{where} say themselves whether they are chats. Leave it out."
        )
