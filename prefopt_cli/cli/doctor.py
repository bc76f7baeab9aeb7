"""`prefopt doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    standard_output,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from prefopt_cli.launch.doctor.examination import Examined
    from prefopt_cli.launch.doctor.finding import Finding

EPILOG = "Example: prefopt doctor recipes/gpo-hh.yaml"
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}
WIDEST = max(map(len, COLOURS))


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe, to be judged for this machine too.", show_default=False),
    ] = None,
    overrides: OverridesArgument = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what starts two processes.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Examine this machine: versions, devices, disks, the hub, and what to do about what is wrong.

    Exits with 1 where something makes training impossible.
    """
    from prefopt_cli.launch.doctor.examination import examine, sections
    from prefopt_cli.launch.doctor.needs import needs_of
    from prefopt_cli.recipe import load_recipe

    given = [] if recipe is None else [recipe, *(overrides or ())]
    needs = needs_of(load_recipe(recipe, overrides or ())) if recipe is not None else {}
    console = standard_output()
    examined: list[Examined] = []
    for each in examine(sections(given, quick=quick), needs):
        examined.append(each)
        if not json:
            _print(each, console)
    found = [finding for each in examined for finding in each.findings]
    problems = sum(finding.state == "problem" for finding in found)
    if json:
        typer.echo(_as_json(examined, recipe))
    else:
        _conclude(problems, sum(finding.state == "note" for finding in found), recipe, console)
    raise typer.Exit(int(problems > 0))


def _print(examined: "Examined", console: "Console") -> None:
    console.print(examined.title, style="bold", markup=False)
    for finding in examined.findings:
        _print_finding(finding, console)


def _print_finding(finding: "Finding", console: "Console") -> None:
    """The state in words, in colour on a terminal; the text in a column of its own."""
    import textwrap

    from rich.text import Text

    indent = " " * (WIDEST + 4)
    lines = [finding.text] + ([f"-> {finding.remedy}"] if finding.remedy else [])
    if console.is_terminal:
        room = max(console.width - len(indent), 20)
        lines = [
            part
            for line in lines
            for part in textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False)
        ]
    console.print(
        Text.assemble("  ", (f"{finding.state:<{WIDEST}}", COLOURS[finding.state]), "  ", lines[0]),
        soft_wrap=True,
    )
    for line in lines[1:]:
        console.print(indent + line, markup=False, soft_wrap=True)


def _conclude(problems: int, notes: int, recipe: str | None, console: "Console") -> None:
    whose = f"{recipe} cannot be trained here" if recipe else "training is impossible"
    counted = f"{notes} {'note' if notes == 1 else 'notes'}"
    if problems:
        one = problems == 1
        text = (
            f"{problems} {'problem' if one else 'problems'}, {counted}: {whose} until {'it is' if one else 'they are'} "
            "put right."
        )
    else:
        text = f"No problem, {counted}." + (f" {recipe} can be trained here." if recipe else "")
    console.print()
    console.print(text, markup=False, soft_wrap=True)


def _as_json(examined: "Sequence[Examined]", recipe: str | None) -> str:
    import json

    sections = [
        {
            "title": each.title,
            "seconds": each.seconds,
            "findings": [finding.to_dict() for finding in each.findings],
        }
        for each in examined
    ]
    states = [finding.state for each in examined for finding in each.findings]
    return json.dumps(
        {
            "recipe": recipe,
            "problems": states.count("problem"),
            "notes": states.count("note"),
            "sections": sections,
        }
    )
