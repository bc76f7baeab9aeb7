"""What policies are asked: a text, a file of prompts, a data set, or the held-out sets of a run."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from prefopt_cli import data
from prefopt_cli.data import receipt, sources
from prefopt_cli.data.boundaries import encode_rows
from prefopt_cli.data.examples import Comparison, Text, text_key
from prefopt_cli.data.rows import read_rows
from prefopt_cli.data.special_tokens import probe
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Recipe, Source
from prefopt_cli.recipe.schemes import has_scheme
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.sampling_prompts import USUAL_LENGTH

LINES = ".txt"
HELD_OUT_SPLIT = "test"

NO_ROOM = "no room for a reply in the context"

HUB_ID = re.compile(
    r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)(?<!\.txt)(?<!\.gz)"
)
"""`owner/name`, and no file that is missing; a name alone is rather a prompt."""

CHUNK = 64
"""Prompts that are tokenised together, until enough of them fit."""


@dataclass(frozen=True)
class Prompts:
    """Prompts to choose from."""

    origin: str
    """Where they are from, in words."""
    texts: tuple[Text, ...]
    """Each once, in the order of the file."""
    are_loose: bool = False
    """Whether they are texts that no data set holds, which may be meant as a person's message."""

    def as_chats(self) -> "Prompts":
        """Every text as the message of a person."""
        chats = (
            [{"role": "user", "content": text}] if isinstance(text, str) else text for text in self.texts
        )
        return Prompts(self.origin, tuple(chats), self.are_loose)


@dataclass(frozen=True)
class Reader:
    """What turns prompts into the tokens of one policy."""

    tokenizer: Any
    context: int | None
    """The most tokens that the policy takes; None where it says nothing."""


@dataclass(frozen=True)
class Asked:
    """The prompts that are asked, and why others before them are not."""

    origin: str
    distinct: int
    """How many there were to choose from."""
    texts: tuple[Text, ...]
    ids: tuple[tuple[list[int], ...], ...]
    """By policy, the tokens of every prompt."""
    stop_ids: tuple[tuple[int, ...], ...]
    """By policy, the tokens that end a reply."""
    max_new_tokens: int
    left_out: dict[str, int]
    """By reason."""

    def describe(self) -> str:
        """One line."""
        words = (
            f"Prompts: {len(self.texts):,} of {self.distinct:,} from {self.origin}"
            if len(self.texts) < self.distinct
            else f"Prompts: {len(self.texts):,} from {self.origin}"
        )
        left_out = "; ".join(f"{count:,} left out: {reason}" for reason, count in self.left_out.items())
        return f"{words}{f' ({left_out})' if left_out else ''}."


def find_prompts(wanted: str, split: str | None, reporter: Reporter) -> Prompts:
    """Prompts of a file, of a data set, or the text itself.

    Args:
        wanted: a path, a hub id, a scheme's name, or a prompt.
        split: of a data set; without it `test`, but for files, which have no splits.
        reporter: told of progress.

    Raises:
        UserError: there is no such file, or nothing to ask in it.
    """
    if not wanted.strip():
        raise UserError("--prompts: the prompt is empty.")
    require_text("--prompts", wanted)
    path = _existing(wanted)
    is_data = has_scheme(wanted) or HUB_ID.fullmatch(wanted) or (path and path.suffix != LINES)
    if split is not None and not is_data:
        raise UserError("--split is of a data set; with a prompt or a .txt file leave it out.")
    if path and path.is_file() and not _is_readable(path):
        kinds = ", ".join((LINES, *sorted(sources.LOADERS)))
        raise UserError(
            f"--prompts: {path}: files of this kind cannot be read; known are {kinds} (and .gz of data files)."
        )
    if path and path.suffix == LINES:
        return Prompts(str(path), _once(_lines(path)), are_loose=True)
    if has_scheme(wanted) or path or HUB_ID.fullmatch(wanted):
        one_split = path and not (path / "dataset_dict.json").is_file()
        source = Source(source=wanted, split=split or ("train" if one_split else HELD_OUT_SPLIT))
        return Prompts(sources.label(source), _once(_of_source(source, reporter)))
    if looks_like_path(wanted):
        raise UserError(f"--prompts: there is no file {wanted} in {Path.cwd()}.")
    return Prompts("the command line", (wanted,), are_loose=True)


def require_text(key: str, text: str) -> None:
    """Refuse what the shell could not read as UTF-8; Python stands in for such bytes with half characters.

    Raises:
        UserError: see above.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}: this is not UTF-8 text from character {error.start + 1} on. Check the encoding of your terminal, "
            "or write it into a file in UTF-8."
        ) from error


def looks_like_path(text: str) -> bool:
    """Whether a text that is no file was meant as one: by its ending, or by a slash in a single word."""
    name = text.strip().removesuffix(".gz")
    if "\n" in name:
        return False
    ends = any(name.endswith(extension) for extension in (*sources.LOADERS, LINES))
    return (ends and len(name.split()) == 1) or ("/" in name and not re.search(r"\s", name))


def _existing(text: str) -> Path | None:
    """The file or folder of this name; None where there is none, as of most prompts."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long for a name, a zero byte, no such user's home
        return None


def _is_readable(path: Path) -> bool:
    return path.suffix == LINES or Path(path.name.removesuffix(".gz")).suffix in sources.LOADERS


def held_out_prompts(recipe: Recipe, key: str, reporter: Reporter) -> Prompts:
    """The prompts of a recipe's eval sets, in turn.

    Raises:
        UserError: it has none, or they cannot be read.
    """
    settings = recipe.dataset
    if not settings.eval and settings.holdout is None:
        raise UserError(
            f"{key} has no held-out prompts to ask. Name some: --prompts 'a prompt', a file, or a data set."
        )
    if settings.holdout is None:  # the training data need not be there any more
        settings = settings.model_copy(update={"train": next(iter(settings.eval.values()))})
    found = data.load(settings, progress=reporter.progress).eval
    in_turn = chain.from_iterable(zip_longest(*([row.prompt for row in rows] for rows in found.values())))
    name = "the held-out sets" if len(found) > 1 else "the held-out set"
    return Prompts(f"{name} {', '.join(found)}", _once(each for each in in_turn if each is not None))


def choose(
    prompts: Prompts, limit: int, readers: Sequence[Reader], max_new_tokens: int | None, reporter: Reporter
) -> Asked:
    """The first prompts that leave every policy room for a reply.

    Args:
        prompts: to choose from.
        limit: how many are wanted.
        readers: of the policies that are asked.
        max_new_tokens: the longest reply; None: 256, or half of the smallest context where that is less.
        reporter: told of progress.

    Raises:
        UserError: no prompt fits, or a tokenizer cannot be used.
    """
    contexts = [reader.context for reader in readers if reader.context is not None]
    context = min(contexts, default=None)
    new = max_new_tokens or min(USUAL_LENGTH, (context or 2 * USUAL_LENGTH) // 2)
    rows = [Comparison(str(number), "", text, (), ()) for number, text in enumerate(prompts.texts)]
    specials = [probe(reader.tokenizer, rows) for reader in readers]
    left_out: Counter[str] = Counter()
    kept: list[tuple[Text, list[list[int]]]] = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        encoded = [
            encode_rows(part, reader.tokenizer, special)
            for reader, special in zip(readers, specials, strict=True)
        ]
        for row, *versions in zip(part, *encoded, strict=True):
            if len(kept) == limit:
                break
            ids = [version.prompt if version else None for version in versions]
            if reason := _unfit(ids, context, new):
                left_out[reason] += 1
            else:
                kept.append((row.prompt, [each for each in ids if each is not None]))
        enough = len(kept) == limit
        reporter.progress("tokenising prompts", len(rows) if enough else start + len(part), len(rows))
        if enough:
            break
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        remedy = f" With {new} new tokens; set --max-new-tokens lower." if left_out[NO_ROOM] else ""
        raise UserError(f"--prompts: none of {prompts.origin} can be asked ({reasons}).{remedy}")
    texts, ids_of = zip(*kept, strict=True)
    by_policy = tuple(tuple(ids) for ids in zip(*ids_of, strict=True))
    stops = tuple(special.stop_ids for special in specials)
    return Asked(prompts.origin, len(prompts.texts), texts, by_policy, stops, new, dict(left_out))


def _unfit(ids: Sequence[list[int] | None], context: int | None, new: int) -> str | None:
    """Why a prompt, in the tokens of every policy, cannot be asked."""
    if any(each is None for each in ids):
        return receipt.REFUSED
    lengths = [len(each) for each in ids if each is not None]
    if not all(lengths):
        return receipt.EMPTY_PROMPT
    return NO_ROOM if context is not None and max(lengths) + new > context else None


def _of_source(source: Source, reporter: Reporter) -> Iterable[Text]:
    label = sources.label(source)
    found = read_rows(
        sources.open_source(source, reporter.progress),
        source,
        label,
        set(),
        reporter.progress,
        prompts_only=True,
    )
    if not found.comparisons:
        dropped = ", ".join(f"{reason} {count}" for reason, count in found.tally.dropped.items())
        raise UserError(f"--prompts: {label} has no usable prompts ({dropped})")
    return (row.prompt for row in found.comparisons)


def _lines(path: Path) -> list[str]:
    try:
        # Other signs that end a line for Python, such as U+2028, may stand within a prompt.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {path} cannot be read: {error}") from error
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise UserError(f"--prompts: {path} has no prompts; write one on each line.")
    return filled


def _once(texts: Iterable[Text]) -> tuple[Text, ...]:
    """Each text at its first place."""
    found: dict[bytes, Text] = {}
    for text in texts:
        found.setdefault(text_key(text), text)
    return tuple(found.values())
