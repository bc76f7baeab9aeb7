"""The ``dataset`` section: sources, formats, lengths."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from prefopt_cli.recipe.section import Scalar, Section


def _as_list(value: Any) -> Any:
    """A lone source may be written without the list around it."""
    return [value] if isinstance(value, Mapping | str | Source) else value


def _as_source(value: Any) -> Any:
    """A source may be its name alone."""
    return {"source": value} if isinstance(value, str) else value


class Source(Section):
    """Rows from one place: a file, a folder on disk, a dataset of the hub, or the sandbox."""

    source: str = Field(
        min_length=1,
        description="Path of .json, .jsonl, .csv, .parquet (.gz too), of a datasets folder, a hub id, or a "
        "sandbox name: sandbox:helpful.",
    )
    config: str | None = Field(
        default=None, description="Configuration (subset) of a hub dataset; kind of a sandbox's rows."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub dataset.")
    split: str = Field(
        default="train", min_length=1, description="Split; slices as in datasets: train[:10%]."
    )
    format: Literal[
        "auto",
        "standard",
        "conversational",
        "implicit_standard",
        "implicit_conversational",
        "hh_transcript",
        "ranked",
        "scored",
        "best_of_n",
    ] = Field(default="auto", description="Shape of the rows; auto detects it and the receipt names it.")
    columns: dict[
        Literal["prompt", "chosen", "rejected", "responses", "ranking", "scores", "best", "id"], str
    ] = Field(default_factory=dict, description="Column names where they differ: {prompt: question}.")
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="Keep rows whose columns have these values (a list: any of them)."
    )
    limit: int | None = Field(
        default=None, gt=0, description="At most so many rows, after where and shuffling."
    )
    weight: float = Field(
        default=1.0,
        gt=0.0,
        description="How often each row occurs in an epoch: 0.5 keeps half, 2 repeats.",
    )


OneSource = Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=Source | str)]
Sources = Annotated[
    list[OneSource],
    BeforeValidator(_as_list, json_schema_input_type=list[OneSource] | OneSource),
    Field(min_length=1),
]


class DatasetSettings(Section):
    """Preferences to train on and to evaluate on."""

    train: Sources = Field(description="One source or several, mixed by weight.")
    eval: dict[str, Sources] = Field(default_factory=dict, description="Named held-out sets.")
    holdout: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Share of the training prompts set aside, with all their rows, as eval set `holdout`.",
    )
    max_length: int | None = Field(
        default=1024, gt=1, description="Longest prompt + response, in tokens; null: no limit."
    )
    on_overflow: Literal["drop", "truncate_response", "error"] = Field(
        default="drop", description="What happens to a longer row. Always counted in the receipt."
    )
    lists: Literal["auto", "whole", "all_pairs", "adjacent_pairs"] = Field(
        default="auto",
        description="Rows with several responses: whole (methods that take lists), all_pairs or adjacent_pairs of "
        "their ranking, ties left out. auto: whole where the method takes lists, else all_pairs.",
    )
    shuffle: bool = Field(
        default=True, description="Shuffle each training source (before limit) and the mixture."
    )
    seed: int = Field(default=0, ge=0, description="Seed of shuffling, weights and holdout.")

    @field_validator("eval")
    @classmethod
    def _eval_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):  # it names files of the run folder
                raise ValueError(f"the set name {name!r} must consist of letters, digits, '_', '-' and '.'")
        return value
