"""`prefopt sandbox info`."""

from typing import TYPE_CHECKING

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    WorldSeedOption,
    prepare_libraries,
    standard_output,
)
from prefopt_cli.cli.tables import Column, print_line, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from prefopt_cli.sandbox.facts import Facts

EPILOG = "Example: prefopt sandbox info --json"


def info(seed: WorldSeedOption = 0, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say what the sandbox is: prompts, replies, gold rewards, rows, and how noisy the labels are.

    Nothing is built.
    """
    prepare_libraries()
    from prefopt_cli.sandbox.facts import describe

    facts = describe(seed)
    if json:
        from json import dumps

        typer.echo(dumps(facts.to_dict()))
        return
    console = standard_output()
    for line in _introduction(facts):
        print_line(console, line)
    _print_dimensions(facts, console)
    for line in _examples(facts):
        print_line(console, line)
    for line in _ending(facts):
        print_line(console, line)


def _introduction(facts: "Facts") -> "Iterator[str]":
    yield (
        f"Customers' messages and replies to them: {facts.prompts:,} prompts, {facts.replies:,} well-formed replies to "
        f"each, and {len(facts.dimensions)} gold rewards computed by code."
    )
    yield ""
    for name, dimension in facts.dimensions.items():
        yield f"  {name:<8} {dimension.meaning}"
    yield ""


def _print_dimensions(facts: "Facts", console: "Console") -> None:
    columns = {
        "least": [f"{each.least:.2f}" for each in facts.dimensions.values()],
        "most": [f"{each.most:.2f}" for each in facts.dimensions.values()],
        "levels": [str(each.levels) for each in facts.dimensions.values()],
        "malformed": [f"{each.malformed:.2f}" for each in facts.dimensions.values()],
    }
    if facts.labels:
        labels = [facts.labels[name] for name in facts.dimensions]
        columns |= {
            "base\nmean": [f"{each.mean:.2f}" for each in labels],
            "base\nstd": [f"{each.std:.2f}" for each in labels],
            "labels\nagree": [f"{each.agree:.1%}" for each in labels],
            "best\naccuracy": [f"{each.best_accuracy:.1%}" for each in labels],
        }
    print_table(
        console,
        Column("gold\nreward", list(facts.dimensions)),
        [Column(title, cells) for title, cells in columns.items()],
    )
    if facts.labels:
        print_line(console)
        print_line(
            console,
            "labels agree: held-out pairs at temperature 1 whose chosen reply has the higher gold reward; best "
            "accuracy: what a policy gets there that knows the gold reward and guesses between equals.",
        )
    print_line(console)
    print_line(console, "Better in one and worse in the other, of all pairs of replies to a prompt:")
    for dimensions, share in facts.conflicts.items():
        print_line(console, f"  {dimensions.replace('/', ' against '):<24} {share:.1%}")
    print_line(console)


def _examples(facts: "Facts") -> "Iterator[str]":
    yield "An example prompt, with its best and its worst reply in each dimension:"
    yield ""
    yield from (f"  {line}" for line in facts.example.splitlines())
    for name, dimension in facts.dimensions.items():
        yield f"  {name}"
        for one in (dimension.best, dimension.worst):
            yield f"    {one.reward:5.2f} {one.reply}"
    yield ""


def _ending(facts: "Facts") -> "Iterator[str]":
    most = "" if facts.is_built else "at most "
    yield "Preference data, labelled anew for each dimension:"
    for split, rows in facts.rows.items():
        yield (
            f"  {split:<5} {most}{rows.pairs:,} pairs or {rows.lists:,} lists of {rows.list_length}, "
            f"on {rows.prompts:,} prompts"
        )
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    if facts.bytes is not None:
        yield f"built: {facts.folder} ({facts.bytes / 1e6:.1f} MB)"
        return
    seed = f" --seed {facts.seed}" if facts.seed else ""
    yield f"not built yet; it will lie in {facts.folder}"
    yield f"The base policy's rewards and the labels' noise are known after: prefopt sandbox build{seed}"
