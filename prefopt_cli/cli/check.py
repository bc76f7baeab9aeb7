"""`prefopt check`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prefopt_cli.cli.check_degrees import has_colour, print_degrees, visible
from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    RunsDirOption,
    prepare_libraries,
    standard_error,
    standard_output,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from prefopt_cli.training.forecast import Packing
    from prefopt_cli.training.inspection import Inspection, MaskedResponse

EPILOG = "Example: prefopt check recipes/gpo-hh.yaml dataset.max_length=512"

REFERENCE_USES = {
    "cached": "scored once before training",
    "every step": "run in every step",
    "samples": "compared with the policy on the policy's own samples",
}

OF_ITS_OWN = ("samples", "none")
"""Uses of the reference by methods that TRL does not have, so that there is no step of its to compare with."""

CONTEXT_SHOWN, TRAINED_SHOWN, END_SHOWN = 16, 24, 8
"""Tokens shown before the boundary, after it, and at the end of a response."""


def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=0, help="Pairs (or lists) to show token by token.")
    ] = 2,
    device: Annotated[
        str, typer.Option("--device", help="Where the run will take place: auto, cpu or cuda.")
    ] = "auto",
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a recipe, its data and its memory in seconds, without loading weights."""
    from prefopt_cli.errors import UserError
    from prefopt_cli.recipe import load_recipe

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, found {device!r}.")
    loaded = load_recipe(recipe, overrides or ())
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.training.inspection import inspect
    from prefopt_cli.training.reporting import Silent

    # The receipt is part of the result here, so it must not be printed along the way.
    reporter = reporter_for(standard_error(), receipts=False) if not json else Silent()
    where: Literal["cpu", "cuda"] | None = None if device == "auto" else "cuda" if device == "cuda" else "cpu"
    try:
        found = inspect(
            loaded,
            recipe_folder=Path(recipe).parent,
            reporter=reporter,
            device=where,
            pairs=pairs,
            runs=RunFinder(runs_dir),
        )
    finally:
        reporter.close()
    if json:
        typer.echo(_as_json(found))
    else:
        _print(found, recipe, standard_output())


def _as_json(found: "Inspection") -> str:
    import json

    return json.dumps(found.to_dict())


def _print(found: "Inspection", recipe: str, console: "Console") -> None:
    from prefopt_cli.cli.receipt import print_receipt

    def line(text: str = "") -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"{recipe}: the recipe is sound.")
    line()
    print_receipt(found.receipt, console)
    line()
    if found.masks:
        line("What is trained (marked) and what is only read, token by token:")
        for mask in found.masks:
            console.print(_mask_line(mask, colour=has_colour(console)), soft_wrap=True)
        line()
    if found.degrees:
        print_degrees(found.degrees, console)
        line()
    line(f"Loss: {found.method}.")
    if found.reference:
        line(f"Reference policy: {found.reference}; {REFERENCE_USES[found.packing.reference]}.")
    line(f"Steps: {found.steps} of {found.rows_per_step} {_rows(found)} per process.")
    _print_sampling(found, console)
    line()
    _print_packing(found.packing, _rows(found), console)
    line()
    _print_memory(found, console)
    for note in found.notes:
        line(f"Note: {note}")


def _rows(found: "Inspection") -> str:
    """What a row of the training data is."""
    return "pairs" if found.receipt["sets"]["train"]["chosen_longer"] is not None else "lists"


def _print_sampling(found: "Inspection", console: "Console") -> None:
    from prefopt_cli.training.memory import format_bytes

    plan = found.sampling
    if plan is None:
        return
    draws = -(-found.steps // plan.every)
    with_what = "With the frozen policy they" if "frozen policy" in found.memory.parts else "They"
    console.print(
        f"Samples: {_count(plan.per_draw, 'response')} per process, drawn {_count(draws, 'time')}, every "
        f"{_count(plan.every, 'step')}; each of at most {_count(plan.max_new_tokens, 'token')}, to one of "
        f"{_count(plan.prompts, 'prompt')}. {with_what} add at most {format_bytes(plan.extra_memory)} to the peak of "
        "memory.",
        markup=False,
        soft_wrap=True,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _mask_line(mask: "MaskedResponse", *, colour: bool) -> "Text":
    """The tokens around the boundary. Without colour, trained tokens stand between » and «."""
    from rich.text import Text

    context, trained = mask.context, mask.trained
    text = Text(f"  {mask.row_id} {mask.side}: ")
    hidden = len(context) - CONTEXT_SHOWN
    text.append(f"({hidden} more) " if hidden > 0 else "")
    text.append("|".join(map(visible, context[-CONTEXT_SHOWN:])), style="dim" if colour else "")
    text.append(" " if colour else " »")
    style = ("bold red" if mask.rank else "bold green") if colour else ""
    if len(trained) <= TRAINED_SHOWN + END_SHOWN:
        text.append("|".join(map(visible, trained)), style=style)
    else:
        text.append("|".join(map(visible, trained[:TRAINED_SHOWN])), style=style)
        text.append(f" ({len(trained) - TRAINED_SHOWN - END_SHOWN} more) ")
        text.append("|".join(map(visible, trained[-END_SHOWN:])), style=style)
    text.append("" if colour else "«")
    return text


def _print_packing(packing: "Packing", rows: str, console: "Console") -> None:
    from prefopt_cli.cli.tables import Column, print_table

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if packing.packed:
        line("Layout: packed, every prompt once and no padding, unless the first batch speaks against it.")
    else:
        line(f"Layout: padded rows, because {packing.reason}.")
    padded = (f"{packing.padded_tokens:,.0f}", f"{packing.padding_share:.0%}")
    own = (f"{packing.packed_tokens:,.0f}", "none") if packing.packed else padded
    title = f"a batch of {packing.rows} {rows} (mean of {packing.batches:,})"
    names = ["tokens through the model", "of them padding", "of them in responses"]
    texts = [f"{packing.response_tokens:,.0f}"]
    if packing.unscored_tokens is not None:
        names.append("of them in degraded responses")
        texts.append(f"{packing.unscored_tokens:,.0f}")
    of_its_own = packing.reference in OF_ITS_OWN or packing.unscored_tokens is not None
    print_table(
        console,
        Column(title, names),
        [
            Column("padded rows" if of_its_own else "TRL's padded rows", [*padded, *texts]),
            Column("prefopt", [*own, *texts]),
        ],
    )
    if of_its_own:
        left_out = ", the samples not counted" if packing.reference == "samples" else ""
        line(
            f"Predicted from the arithmetic: {packing.speedup_precomputed:.1f} times as fast as on padded rows"
            f"{left_out}."
        )
        if packing.unscored_cost is not None:
            line(
                f"The degree loss adds {packing.unscored_cost:.0%} to the arithmetic of a step (predicted): it takes "
                f"{1 + packing.unscored_cost:.1f} times as long as with method.align alone."
            )
        return
    line(
        f"Predicted from the arithmetic: {packing.speedup:.1f} times as fast as TRL's step as it comes, "
        f"{packing.speedup_precomputed:.1f} times with its reference precomputed."
    )


def _peak(found: "Inspection") -> str:
    """What the memory estimate is of."""
    if found.memory.phase == "sampling":
        return "there while samples are drawn, those of the longest prompts and as long as they may become"
    batch = (
        "that of the heaviest batch of an epoch in random order, with "
        f"{found.packing.heaviest_tokens:,} tokens through the model"
    )
    if found.packing.unscored_tokens is not None:
        batch += ", every response beside the longest degraded versions that may be drawn"
    return batch if found.sampling is None else f"{batch}, and of samples as long as they may become"


def _print_memory(found: "Inspection", console: "Console") -> None:
    from rich import box
    from rich.table import Table

    from prefopt_cli.training.memory import format_bytes

    memory = found.memory
    share = memory.trainable_parameters / memory.parameters
    console.print(
        f"Parameters: {memory.parameters:,}, of which {memory.trainable_parameters:,} ({share:.1%}) are trained."
    )
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column(f"peak memory per process on {found.device}, {memory.phase}")
    table.add_column("estimate", justify="right")
    rows: dict[str, Any] = {**memory.parts, "total": memory.total}
    for part, size in rows.items():
        table.add_row(part, format_bytes(size), style="bold" if part == "total" else "")
    console.print(table)
    console.print(f"It is {_peak(found)}.", soft_wrap=True)
    for note in memory.notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
