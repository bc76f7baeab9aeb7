"""Held-out preferences: which ones, as text and in tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_cli import data
from prefopt_cli.data import sources
from prefopt_cli.data.examples import Comparison, plain_text, text_key
from prefopt_cli.data.loading import HOLDOUT
from prefopt_cli.data.tokens import Lists
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.targets import Target
from prefopt_cli.models import loading
from prefopt_cli.recipe.schema import DatasetSettings, Source
from prefopt_cli.recipe.schemes import has_scheme
from prefopt_cli.scoring.choice import scores_depend_on_batch
from prefopt_cli.training.extent import longest_row
from prefopt_cli.training.preparation import require_fit
from prefopt_cli.training.reporting import Reporter

ALL_DIMENSIONS = "all"
DIMENSION_COLUMN = "dimension"

TAKEN = ("train", "prompts", HOLDOUT)
"""Names that no set made of a file's name may have."""


@dataclass(frozen=True)
class HeldOutSet:
    """One set of preferences that a policy is asked about."""

    name: str
    tokens: Dataset
    """See `prefopt_cli.data.tokens.TokenizedData`; lists are whole."""
    texts: dict[str, Comparison]
    """By row id."""
    fingerprint: str
    dropped: dict[str, int]
    """Rows that were read and are not here, by reason."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""
    read: tuple[tuple[str, int], ...] = ()
    """Sources, and how many rows each of them has."""

    @property
    def ids(self) -> list[str]:
        """Row ids, in order."""
        return list(self.tokens["row_id"][:])

    def prompt_keys(self) -> list[bytes]:
        """For every row a digest of its prompt's words."""
        return [prompt_key(self.texts[each]) for each in self.ids]


def prompt_key(row: Comparison) -> bytes:
    """A digest of a prompt's words: the same for the same prompt in another format, as text or as messages."""
    return text_key(plain_text(row.prompt).strip())


def chosen_sets(
    settings: DatasetSettings, listed: Sequence[str], *, split: str | None, dimensions: Sequence[str]
) -> DatasetSettings:
    """The recipe's held-out sets, or those that a command line names in place of them.

    Args:
        settings: the recipe's.
        listed: sources in place of the recipe's eval sets, each `SOURCE` or `NAME=SOURCE`.
        split: of these sources; None: `test` of those on the hub and of schemes, else all there is.
        dimensions: of the recipe's sets, only those; of listed sources, one set for each: the rows whose column
            `dimension` says so (`all`: one for every value of the column).

    Raises:
        UserError: there are none, or no such dimension.
    """
    if not listed:
        if split is not None:
            raise UserError(
                "--split is of the preferences that --data names; without --data it has no meaning."
            )
        return _of_recipe(settings, dimensions)
    found: dict[str, list[Source]] = {}
    explicit = {set_name(each) for each in listed if _taken_apart(each)[1] != each}
    for each in listed:
        name, source = _named(each, split)
        for part, narrowed in _by_dimension(name, source, dimensions):
            part = f"{name}-{part}" if dimensions and len(listed) > 1 else part
            if part in found and part not in explicit:
                raise UserError(
                    f"--data {each}: another set is called {part}, too. Name them: --data NAME=SOURCE."
                )
            found.setdefault(part, []).append(narrowed)
    return _with_sets(settings, found)


def read_sets(
    settings: DatasetSettings, tokenizer: Any, config: Any, reporter: Reporter, *, lists: Lists = "whole"
) -> tuple[data.PreferenceData, data.TokenizedData]:
    """The held-out sets as text and in tokens; the training data is not looked at, unless it is held out from.

    Raises:
        UserError: they cannot be read, or do not fit the model.
    """
    if settings.holdout is None:  # the training data need not be there any more
        first = next(iter(settings.eval))
        settings = settings.model_copy(update={"train": settings.eval[first]})
    try:
        text = data.load(settings, progress=reporter.progress)
        tokens = data.tokenize(
            text, tokenizer, settings, progress=reporter.progress, lists=lists, report=reporter.message
        )
    except UserError as error:
        if settings.holdout is not None:
            raise
        raise UserError(str(error).replace("the set train ", f"the set {first} ")) from error
    require_fit(config, tokens)
    if scores_depend_on_batch(config, max(map(longest_row, tokens.eval.values()))):
        raise UserError(
            "With this model's rotary embeddings a score depends on the longest sequence of its batch, so that "
            "policies cannot be compared. Set dataset.max_length to original_max_position_embeddings of its "
            "config.json or less."
        )
    return text, tokens


def held_out_sets(target: Target, settings: DatasetSettings, reporter: Reporter) -> dict[str, HeldOutSet]:
    """The sets in the tokens of a target's tokenizer.

    Raises:
        UserError: see `read_sets`.
    """
    config = loading.load_config(target.source, target.recipe.model)
    if target.run is None and "max_length" not in settings.model_fields_set:
        settings = settings.model_copy(update={"max_length": room(config, settings.max_length)})
    tokenizer = loading.load_tokenizer(target.source, target.recipe.model)
    try:
        text, tokens = read_sets(settings, tokenizer, config, reporter)
    except UserError as error:
        raise UserError(f"{error}{_hint(target, settings)}") from error
    return {
        name: HeldOutSet(
            name,
            rows,
            {row.row_id: row for row in text.eval[name]},
            tokens.fingerprints[name],
            tokens.receipt.sets[name].dropped(),
            tokens.stop_ids,
            tuple((each.source, each.read) for each in tokens.receipt.sets[name].sources),
        )
        for name, rows in tokens.eval.items()
    }


def _hint(target: Target, settings: DatasetSettings) -> str:
    """A sentence where a run's recipe names files that are not there."""
    if target.run is None or settings.eval != target.recipe.dataset.eval:
        return ""
    named = [Path(each.source) for listed in settings.eval.values() for each in listed]
    if all(has_scheme(str(path)) or path.is_absolute() or path.exists() for path in named):
        return ""
    return (
        f"\nIt is named by {target.run.recipe}, from the folder in which the training was started: run the command "
        "there, or name the preferences with --data."
    )


def prompt_numbers(rows: Dataset) -> np.ndarray:
    """(N,) for every row the number of its prompt, the same where the prompts are."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(tuple(ids), len(numbers)) for ids in rows["prompt_ids"][:]])


def room(config: Any, usual: int | None) -> int | None:
    """Longest prompt + response that a model is asked about: the usual, or its context where that is shorter."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(filter(None, (context, usual)), default=None)


def _of_recipe(settings: DatasetSettings, dimensions: Sequence[str]) -> DatasetSettings:
    names = [*settings.eval, *([HOLDOUT] if settings.holdout is not None else [])]
    if not names:
        raise UserError(
            "There are no held-out preferences: the recipe has neither dataset.eval nor dataset.holdout. Name some "
            "with --data FILE."
        )
    missing = [each for each in dimensions if each not in names]
    if missing:
        raise UserError(
            f"--dimension {missing[0]}: the recipe has no held-out set of this name; it has {', '.join(names)}."
        )
    if not dimensions:
        return settings
    return settings.model_copy(
        update={
            "eval": {name: listed for name, listed in settings.eval.items() if name in dimensions},
            "holdout": settings.holdout if HOLDOUT in dimensions else None,
        }
    )


def _with_sets(settings: DatasetSettings, found: dict[str, list[Source]]) -> DatasetSettings:
    """Copied field by field, so that what was left to its default still counts as such."""
    return settings.model_copy(update={"eval": found, "holdout": None, "train": next(iter(found.values()))})


def set_name(given: str) -> str:
    """What the set of a `--data` argument is called: `NAME=SOURCE` says so, else its source's name."""
    return _taken_apart(given)[0]


def _taken_apart(given: str) -> tuple[str, str]:
    """Name and source of `SOURCE` or `NAME=SOURCE`."""
    name, equals, place = given.partition("=")
    if equals and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        return name, place
    return _slug(given), given


def _named(given: str, split: str | None) -> tuple[str, Source]:
    """The name of a set and its source."""
    name, place = _taken_apart(given)
    if not place:
        raise UserError(f"--data {given!r}: name a file, a folder, a hub id or a sandbox's preferences.")
    source = Source(source=place)
    if split is not None:
        source = Source(source=place, split=split)
    elif has_scheme(place) or sources.looks_like_hub_id(source):
        source = Source(source=place, split="test")
    return name, source


def _slug(place: str) -> str:
    """A name for files and tables: what a path or an id ends with, without endings that say how it is packed."""
    last = re.split(r"[/\\:]", place.rstrip("/\\"))[-1]
    last = re.sub(r"(\.(jsonl?|csv|parquet|gz))+$", "", last)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).lstrip("_.-") or "data"
    return f"{slug}-data" if slug in TAKEN else slug


def _by_dimension(name: str, source: Source, dimensions: Sequence[str]) -> list[tuple[str, Source]]:
    if not dimensions:
        return [(name, source)]
    rows = sources.open_source(source)
    if DIMENSION_COLUMN not in rows.column_names:
        raise UserError(
            f"--dimension: {source.source} has no column {DIMENSION_COLUMN!r}; it has {', '.join(rows.column_names)}."
        )
    there = {str(value): value for value in rows[DIMENSION_COLUMN]}  # which may be numbers
    wanted = list(there if ALL_DIMENSIONS in dimensions else dimensions)
    missing = [each for each in wanted if each not in there]
    if missing:
        raise UserError(
            f"--dimension {missing[0]}: {source.source} has none of it; it has {', '.join(there)}."
        )
    return [
        (_slug(each), source.model_copy(update={"where": {DIMENSION_COLUMN: there[each]}})) for each in wanted
    ]
