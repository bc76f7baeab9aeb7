"""`prefopt lineage`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import DebugOption, JsonOption, RunsDirOption, main_process, standard_output
from prefopt_cli.cli.tables import print_hanging

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.models.lineage import Lineage, Step

EPILOG = "Example: prefopt lineage runs/harmless"

SHORT = 12
"""Characters of a hash that are shown."""


def lineage(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder, or one that prefopt merge made.", show_default=False
        ),
    ],
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw what a run's policy went through: base, then every stage with its method, data and adapter.

    For each it is told whether the run is still there, and still the one that the next began with.
    """
    from prefopt_cli.models.lineage import find_lineage
    from prefopt_cli.runs.finding import RunFinder

    found = find_lineage(run, RunFinder(runs_dir))
    if not main_process():
        return
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict()))
    else:
        print_lineage(found, standard_output())


def print_lineage(lineage: "Lineage", console: "Console") -> None:
    """The base and below it the stages, each deeper than the one that it came from."""
    branch, stem = ("└─ ", "│  ") if console.encoding.startswith("utf") else ("`- ", "|  ")
    state = f" ({lineage.base_state})" if lineage.base_state else ""
    print_hanging(console, "base: ", f"{lineage.base}{state}")
    for depth, step in enumerate(lineage.steps):
        indent = " " * len(branch) * depth
        print_hanging(console, f"{indent}{branch}", f"{depth + 1} {step.dimension} ({step.state})")
        is_last = depth == len(lineage.steps) - 1
        ends = is_last and lineage.merged is None
        under = " " * len(branch) + (" " * len(stem) if ends else stem)
        for title, text in _details(step, lineage.reference if is_last else None):
            print_hanging(console, f"{indent}{under}{title + ':':<11}", text)
    if lineage.merged:
        print_hanging(
            console, f"{' ' * len(branch) * len(lineage.steps)}{branch}", f"merged: {lineage.merged}"
        )


def _details(step: "Step", reference: str | None) -> list[tuple[str, str]]:
    trained = f"adapter {step.adapter}" if step.adapter else "all weights"
    train = step.data.get("train")
    return [
        *(
            [("start", f"merged into {step.merged_start} ({_whether_there(step)})")]
            if step.merged_start
            else []
        ),
        ("method", _method(step)),
        ("trained", trained),
        *([("reference", reference)] if reference else []),
        ("data", f"train {train[:SHORT]}" if train else "not recorded"),
        ("run", f"{step.run} (id {step.run_id[:SHORT]})" if step.run_id else step.run),
    ]


def _whether_there(step: "Step") -> str:
    return "there" if Path(str(step.merged_start)).is_dir() else "gone"


def _method(step: "Step") -> str:
    """`sequential, logistic, beta 0.1, lambda helpful 0.5`."""
    alignment = step.alignment
    parts = [str(alignment.get("name", "unknown"))]
    if alignment is not step.method:
        parts[0] = f"{step.method.get('name')} with {parts[0]}"
    if "loss" in alignment:
        parts.append(str(alignment["loss"]))
    parts += [f"{name} {alignment[name]:g}" for name in ("beta", "alpha", "kl_coef") if name in alignment]
    parts += [f"lambda {name} {value:g}" for name, value in step.lambdas.items()]
    if alignment.get("length_normalize"):
        parts.append("log-ratios per token")
    if alignment.get("adapter_per_stage") == "new" and step.adapter and not step.merged_start:
        parts.append("a new adapter on top")
    return ", ".join(parts)
