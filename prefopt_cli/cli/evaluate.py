"""`prefopt eval`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    RunsDirOption,
    last_work,
    main_process,
    prepare_libraries,
    scoring,
    standard_output,
)

if TYPE_CHECKING:
    from prefopt_cli.evaluation.targets import Target

EPILOG = "Example: prefopt eval runs/gpo-hh --data more.jsonl --name more"

HELD_OUT = "heldout"

TAKEN = {"compare": "compare", "retention": "retention", "samples": "sample", "sandbox": "sandbox score"}
"""Folders that other commands write to, beside those of evaluations."""

LONGEST_NAME = 100

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Preferences in place of the recipe's held-out sets: a file, folder, hub id or sandbox:helpful; "
        "NAME=SOURCE names the set. May be repeated.",
        show_default=False,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="Of --data; by default test of hub data and the sandbox, all of a file.",
        show_default=False,
    ),
]
DimensionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dimension",
        metavar="NAME",
        help="Only this held-out set of the recipe; with --data the rows whose column `dimension` says so, `all` "
        "for one set each. May be repeated.",
        show_default=False,
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="RUN_OR_MODEL",
        help="Policy to measure from; by default the one that the run began with. none: log-probabilities alone.",
        show_default=False,
    ),
]
BetaOption = Annotated[
    float | None,
    typer.Option(
        "--beta",
        min=0.0,
        help="Scale of the implicit reward; by default the run's beta or alpha, 0.1 for models.",
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Fields to set over the recipe's, such as dataset.max_length=512.",
        show_default=False,
    ),
]


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Run folder, folder of a model or an adapter, hub id, or sandbox:base.",
            show_default=False,
        ),
    ],
    overrides: OverridesArgument = None,
    data: DataOption = None,
    split: SplitOption = None,
    dimension: DimensionOption = None,
    reference: ReferenceOption = None,
    beta: BetaOption = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help=f"Of the evaluation, whose files go to eval/NAME; by default {HELD_OUT}, or the data's name, with "
            "dimension, reference and the like.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where the files go; by default eval/NAME in the run folder, for a model in eval/MODEL/NAME here.",
            show_default=False,
        ),
    ] = None,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a policy on held-out preferences: accuracy, margins, calibration, each with its 95 % interval.

    A run is asked about the held-out sets of its recipe, and measured from the policy that it began with. Writes a
    line for every pair, a summary, and a report for the browser. Known log-probabilities come from the cache.
    """
    from prefopt_cli.errors import UserError

    if beta == 0:
        raise UserError("--beta 0: every reward would be 0; give a number above it.")
    prepare_libraries()
    from prefopt_cli.evaluation.evaluate import evaluate as evaluated
    from prefopt_cli.evaluation.held_out import chosen_sets, held_out_sets
    from prefopt_cli.evaluation.overlap import TrainingPrompts
    from prefopt_cli.evaluation.targets import find_target
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.runs.writable import require_writable

    with scoring() as work:
        runs = RunFinder(runs_dir)
        found = find_target(
            target, work.reporter, runs, reference=reference, beta=beta, overrides=overrides or ()
        )
        asked = Asked(data or [], split, dimension or [], reference, beta, overrides or [])
        folder = _folder(found, name, output, asked)
        require_writable(folder, key="--output" if output else "RUN_OR_MODEL: the folder")
        settings = chosen_sets(found.recipe.dataset, data or [], split=split, dimensions=dimension or [])
        sets = held_out_sets(found, settings, work.reporter)
        trained = TrainingPrompts(runs, work.reporter).of(found.run)
        result = evaluated(
            found,
            sets,
            work.reporter,
            trained=trained,
            stopping=work.stopping,
        )
    with last_work() as alone:
        if alone:
            result.write(folder, title=f"{found.name} on {', '.join(sets)}")
    if not main_process():
        return
    if json:
        from json import dumps

        typer.echo(dumps(result.to_dict()))
        return
    from prefopt_cli.cli.evaluation_report import print_evaluation

    print_evaluation(result, folder, standard_output())


class Asked(NamedTuple):
    """What makes one evaluation of a policy another than the next."""

    data: list[str]
    split: str | None
    dimension: list[str]
    reference: str | None
    beta: float | None
    overrides: list[str]

    @property
    def name(self) -> str:
        """A name for the folder, so that no evaluation takes the place of another."""
        from prefopt_cli.evaluation.held_out import set_name

        parts = ["-".join(map(set_name, self.data)) or HELD_OUT, *self.dimension]
        parts += [self.split] if self.split else []
        parts += [f"from-{Path(self.reference).name}"] if self.reference else []
        parts += [f"beta-{self.beta:g}"] if self.beta else []
        if self.overrides:
            import hashlib

            parts.append(hashlib.sha256("\n".join(self.overrides).encode()).hexdigest()[:8])
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts)).strip("-.")[:LONGEST_NAME]
        return f"{name}-data" if name in TAKEN else name


def _folder(found: "Target", name: str | None, output: Path | None, asked: Asked) -> Path:
    """Where the files go.

    Raises:
        UserError: the name is none of a folder, or is that of something else's.
    """
    from prefopt_cli.errors import UserError

    if output is not None:
        return output.expanduser()
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"--name {name!r}: a name has letters, digits, '_', '-' and '.', and no slash.")
    if name in TAKEN:
        raise UserError(
            f"--name {name}: eval/{name} is where `prefopt {TAKEN[name]}` writes; choose another."
        )
    if found.run is not None:
        return found.run.evaluation(name or asked.name)
    return Path("eval") / re.sub(r"[^A-Za-z0-9_.-]+", "-", found.name).strip(".-") / (name or asked.name)
