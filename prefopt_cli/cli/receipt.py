"""The data receipt as a table: what was read, what was left out and why, and how long the texts are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.data.receipt import Receipt

IDS_SHOWN = 3
NARROW = 72
"""Columns of text below which tables would only be scraps of words."""

ROWS = ("set", "source", "rows", "examples")
TOKENS = ("set", "side", "p5", "p50", "p95", "max", "total")


def print_receipt(receipt: Receipt | Mapping[str, Any], console: Console) -> None:
    """Print a receipt, or the dict that ``Receipt.to_dict`` made of it; plain lines where it is narrow."""
    record = receipt if isinstance(receipt, Mapping) else receipt.to_dict()
    _print_table(console, ROWS, list(_rows(record)))
    _print_table(console, TOKENS, list(_lengths(record)))
    for line in _remarks(record):
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _print_table(console: Console, titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    if console.width < NARROW:
        for row in (titles, *rows):
            console.print("  ".join(filter(None, row)), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for title in titles:
        right = title in ("rows", *TOKENS[2:])
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One line per source, and one per reason under it."""
    for set_name, one in record["sets"].items():
        for number, source in enumerate(one["sources"]):
            yield (
                set_name if not number else "",
                f"{source['source']} ({source['format']})",
                str(source["read"]),
                "",
            )
            yield from _reasons(source)
            yield "", "  kept", str(source["kept"]), ""
            if source["rows"] != source["kept"]:
                yield "", "  with repeats by weight", str(source["rows"]), ""


def _reasons(source: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Dropped rows with a minus sign, then rows that were only changed, in brackets; the commonest first."""
    for sign, counts in (("-", source["dropped"]), ("", source["changed"])):
        for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
            ids = [row.removeprefix(f"{source['source']}:") for row in source["examples"][reason][:IDS_SHOWN]]
            more = ", ..." if count > len(ids) else ""
            yield "", f"  {reason}" if sign else f"  ({reason})", f"{sign}{count}", ", ".join(ids) + more


def _lengths(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Percentiles of the lengths, one line per set and side."""
    for set_name, one in record["sets"].items():
        for number, (side, lengths) in enumerate(one["lengths"].items()):
            figures = (str(lengths[name]) for name in TOKENS[2:])
            yield set_name if not number else "", side, *figures


def _remarks(record: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on each set, on lengths and on special tokens."""
    for name, one in record["sets"].items():
        line = f"{name}: {_content(one)}"
        if one["chosen_longer"] is not None:
            line += f"; chosen longer in {one['chosen_longer']:.1%}, equally long in {one['same_length']:.1%}"
        yield line
        if one.get("degrees"):
            yield f"{name}: {_degrees(one['degrees'])}"
        if one["leaked_prompts"]:
            shares = f"{one['leaked_prompts']} of the {one['prompts']} prompts of {name}"
            yield f"warning: {shares} also occur in train"
    yield from _levels(record)
    if record["max_length"] is not None:
        yield f"max_length: {record['max_length']} tokens; longer rows: {record['on_overflow']}"
    if record["special_tokens"]:
        yield record["special_tokens"]["verdict"]


def _degrees(counts: Mapping[str, Any]) -> str:
    """How many responses have degraded versions, and how many of each level."""
    levels = ", ".join(
        f"level {level} {count:,}" for level, count in counts["levels"].items() if level != "0"
    )
    without = counts["responses"] - counts["taking_part"]
    return (
        f"{counts['taking_part']:,} of {counts['responses']:,} responses have degrees: {levels}; {without:,} take no "
        "part"
    )


def _levels(record: Mapping[str, Any]) -> Iterator[str]:
    """What a level is, once for all sets."""
    counts = next((one["degrees"] for one in record["sets"].values() if one.get("degrees")), None)
    if counts:
        levels = len(counts["levels"])
        yield (
            f"degrees: level k of {levels} lacks about k/{levels} of a response's key phrases, and level 0 is the "
            "response itself; of levels that come out alike the lowest is kept"
        )


def _content(one: Mapping[str, Any]) -> str:
    """What a set consists of: pairs, lists, pairs made of lists, or prompts alone."""
    prompts = f"{one['prompts']} prompts"
    if one["responses"] == 0:
        return f"{prompts} to sample for"
    if one["pairs"] is not None:
        return f"{one['rows']} lists made into {one['pairs']} pairs ({one['pairing']}), {prompts}"
    if one["list_sizes"] is not None:
        fewest, most = one["list_sizes"]
        size = f"{most}" if fewest == most else f"{fewest} to {most}"
        return f"{one['rows']} lists ({size} responses), {prompts}"
    return f"{one['rows']} pairs, {prompts}"
