"""`prefopt check`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prefopt_cli.cli.check_degrees import has_colour, print_degrees, visible
from prefopt_cli.cli.check_fit import print_fit, read_bytes
from prefopt_cli.cli.check_memory import print_memory
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
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Memory of each GPU, such as 24GiB: does it fit, and how?"
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", min=1, help="GPUs on all machines; as many as the recipe's processes if left out."
        ),
    ] = None,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a recipe, its data and its memory in seconds, without loading weights."""
    from prefopt_cli.errors import UserError
    from prefopt_cli.recipe import load_recipe

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, found {device!r}.")
    if gpus is not None and memory is None:
        raise UserError(
            "--gpus: says how many GPUs share a budget; add --memory, for example --memory 24GiB."
        )
    size = read_bytes(memory) if memory is not None else None
    loaded = load_recipe(recipe, overrides or ())
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.training.inspection import inspect
    from prefopt_cli.training.memory_fit import Budget
    from prefopt_cli.training.reporting import Silent

    # The receipt is part of the result here, so it must not be printed along the way.
    reporter = reporter_for(standard_error(), receipts=False) if not json else Silent()
    where: Literal["cpu", "cuda"] | None = "cuda" if gpus and not loaded.training.get("use_cpu") else None
    if device != "auto":
        where = "cuda" if device == "cuda" else "cpu"
    budget = None
    if size is not None:
        budget = Budget(size, lambda more: load_recipe(recipe, [*(overrides or ()), *more]), gpus)
    try:
        found = inspect(
            loaded,
            recipe_folder=Path(recipe).parent,
            reporter=reporter,
            device=where,
            pairs=pairs,
            runs=RunFinder(runs_dir),
            budget=budget,
        )
    finally:
        reporter.close()
    if json:
        typer.echo(_as_json(found))
    else:
        _print(found, recipe, overrides or [], standard_output())


def _as_json(found: "Inspection") -> str:
    import json

    return json.dumps(found.to_dict())


def _print(found: "Inspection", recipe: str, overrides: list[str], console: "Console") -> None:
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
    of_all = "" if found.processes == 1 else f", {found.rows_per_step * found.processes} on {found.processes}"
    line(f"Steps: {found.steps} of {found.rows_per_step} {_rows(found)} per process{of_all}.")
    _print_sampling(found, console)
    line()
    _print_packing(found.packing, _rows(found), console)
    line()
    print_memory(found, console)
    if found.fit:
        line()
        print_fit(found, recipe, overrides, console)
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
