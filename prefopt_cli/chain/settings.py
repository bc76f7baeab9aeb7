"""A chain as validated objects."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.recipe.schema import Recipe, SequentialSettings
from prefopt_cli.runs.closing import CHAIN_RECORD

PLAN_FILE = CHAIN_RECORD
RESOLVED_FILE = "chain.yaml"
RETENTION_FILES = ("retention.json", "retention.csv", "retention.png")

BASE = "base"
"""What the policy before the first stage is called."""


@dataclass(frozen=True)
class ChainStage:
    """A stage as the file describes it."""

    number: int
    """From 1."""
    dimension: str
    recipe: Recipe
    """With its own run, and those of the stages before, in the chain's folder."""

    @property
    def lambdas(self) -> float | Mapping[str, float] | None:
        """Of the earlier dimensions, as the file has them; None in the first stage."""
        settings = self.recipe.method.alignment
        return settings.lambdas if isinstance(settings, SequentialSettings) else None


@dataclass(frozen=True)
class Chain:
    """What `prefopt chain` is to make."""

    file: str
    data: dict[str, Any]
    """What the file says, with the command line's overrides."""
    output_dir: str
    stages: tuple[ChainStage, ...]

    @property
    def folder(self) -> Path:
        """Where the stages' runs, the plan and the retention table lie."""
        return Path(self.output_dir).expanduser()

    def run_folder(self, stage: ChainStage) -> Path:
        """Where a stage's run lies unless it was moved."""
        return self.folder / stage.dimension

    @property
    def recipe_folder(self) -> Path:
        """Where a user's own f is looked for first."""
        return Path(self.file).parent

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Of all stages, in their order."""
        return tuple(stage.dimension for stage in self.stages)
