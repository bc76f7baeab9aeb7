"""`prefopt sample`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import (
    SIGNAL_EXIT_BASE,
    DebugOption,
    JsonOption,
    RunsDirOption,
    prepare_libraries,
    several_processes,
    standard_error,
    standard_output,
)
from prefopt_cli.cli.sample_options import KEY_VARIABLE, OPENAI, REWARD_MODEL, JudgeOptions, require_loose
from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.sandbox.names import LARGEST_SEED

if TYPE_CHECKING:
    from prefopt_cli.evaluation.side_by_side import Samples
    from prefopt_cli.training.reporting import Reporter

EPILOG = "Example: prefopt sample runs/gpo-hh --against reference --per-prompt 2"


def sample(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run folder, folder of a model or an adapter, hub id, or sandbox:base.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE|TEXT",
            help="Data file or data set with prompts, .txt with one on each line, or a prompt. Without it: the run's "
            "held-out sets.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="RUN2",
            help="The policy beside it, named like RUN; `reference`: what the run began with.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts: the first ones that fit.")] = 8,
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, max=1000, help="Replies to each.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="Longest reply; a longer one is cut off.",
            show_default="256, or half of the context where that is less",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: the likeliest token every time.")
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Draw from the likeliest tokens that together have this probability."),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="The same seed, the same replies.")
    ] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Replies written together.")] = 16,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Of a data set with splits.", show_default="test"),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Whether a prompt from the command line or a .txt file is a person's message, put through the chat "
            "template. By default it is where the run was trained on chats.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help=f"{REWARD_MODEL}:PATH_OR_ID, or {OPENAI}:MODEL with --judge-url.",
            show_default=False,
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help=f"Server with OpenAI's chat completions, such as http://localhost:8000/v1. A key is read from "
            f"{KEY_VARIABLE}.",
            show_default=False,
        ),
    ] = None,
    judge_prompt: Annotated[
        Path | None,
        typer.Option(
            "--judge-prompt",
            metavar="FILE",
            help="Rubric in place of ours, with {prompt}, {a} and {b}.",
            show_default=False,
        ),
    ] = None,
    judge_concurrency: Annotated[
        int | None,
        typer.Option(
            "--judge-concurrency", min=1, max=64, help="Requests at the same time.", show_default="4"
        ),
    ] = None,
    judge_rpm: Annotated[
        float | None,
        typer.Option("--judge-rpm", min=0.01, help="The most requests a minute.", show_default="no limit"),
    ] = None,
    judge_timeout: Annotated[
        float | None,
        typer.Option(
            "--judge-timeout", min=0.1, max=86400, help="Seconds to wait for an answer.", show_default="60"
        ),
    ] = None,
    judge_retries: Annotated[
        int | None,
        typer.Option(
            "--judge-retries",
            min=0,
            max=100,
            help="How often a question is asked again.",
            show_default="5",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where samples.jsonl and summary.json go; by default eval/samples in the run folder, and nowhere "
            "for a model.",
            show_default=False,
        ),
    ] = None,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Let a policy reply to prompts, beside another one if named, and have the replies judged.

    Both policies draw with the same random numbers. A judge sees every pair in both orders; a verdict that changes
    with the order counts as a tie.
    """
    if several_processes():
        raise UserError("prefopt sample runs in one process. Run it without torchrun or accelerate launch.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p:g}: a probability above 0, and at most 1.")
    options = JudgeOptions(
        judge, judge_url, judge_prompt, judge_concurrency, judge_rpm, judge_timeout, judge_retries
    )
    options.require_meaning()
    if split is not None and prompts is None:
        raise UserError("--split is of a data set; name it with --prompts.")
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.evaluation.asking import find_prompts, held_out_prompts, require_text
    from prefopt_cli.evaluation.generation import Drawing, SamplingStopped, find_writers
    from prefopt_cli.evaluation.judges.judging import JudgingStopped
    from prefopt_cli.evaluation.side_by_side import require_judgeable, side_by_side
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.runs.writable import require_writable
    from prefopt_cli.training.callbacks import stopping_gently

    for key, text in (("RUN", run), ("--against", against), ("--judge", judge), ("--judge-url", judge_url)):
        require_text(key, text or "")
    drawing = Drawing(per_prompt, temperature, top_p, seed, batch_size)
    drawing.require_finite()
    drawing.require_different_replies()
    reporter = reporter_for(standard_error(), receipts=False)
    folder: Path | None = None
    unjudged: list[tuple[Samples, Path | None]] = []

    def keep(found: "Samples") -> None:
        try:
            if folder is not None:
                found.write(folder)
            unjudged.append((found, folder))
        except PrefoptError as error:
            reporter.message(str(error))
            unjudged.append((found, None))

    try:
        writers = find_writers(run, against, reporter, RunFinder(runs_dir))
        folder = output.expanduser() if output else None
        if folder is None and writers[0].run is not None:
            folder = writers[0].run.evaluation("samples")
        if folder is not None:
            require_writable(folder, key="--output" if output else "RUN: the folder")
        judging = options.open()
        require_judgeable(judging, writers)
        if prompts is None:
            asked = held_out_prompts(writers[0].recipe, f"RUN: {run}", reporter)
        else:
            asked = find_prompts(prompts, split, reporter)
        require_loose(chat, prompts, asked.are_loose)
        if asked.are_loose and (writers[0].knows_chats if chat is None else chat):
            asked = asked.as_chats()
        if judging is not None:
            judging.check()
        with stopping_gently() as stop:
            found = side_by_side(
                writers,
                asked,
                drawing,
                limit=limit,
                max_new_tokens=max_new_tokens,
                judge=judging,
                reporter=reporter,
                stopping=stop.asked,
                keep=keep,
            )
    except SamplingStopped:
        reporter.message("Stopped while replies were drawn; nothing was written.")
        raise typer.Exit(SIGNAL_EXIT_BASE + (stop.received or 0)) from None
    except JudgingStopped:
        _leave(unjudged, json, reporter)
        reporter.message(
            "Stopped. Verdicts of a server are in the cache, and the same command goes on from there."
        )
        raise typer.Exit(SIGNAL_EXIT_BASE + (stop.received or 0)) from None
    except (PrefoptError, KeyboardInterrupt):
        _leave(unjudged, json, reporter)
        raise
    finally:
        reporter.close()
    _tell(found, folder, json)


def _leave(unjudged: "list[tuple[Samples, Path | None]]", json: bool, reporter: "Reporter") -> None:
    """Where judging has come to nothing: show the replies, unless they are in files."""
    for found, folder in unjudged:
        if folder is None:
            _print(found, None, json)
        else:
            reporter.message(f"The replies are in {folder}, without verdicts.")


def _tell(found: "Samples", folder: Path | None, json: bool) -> None:
    """Write the files and print the results.

    Raises:
        PrefoptError: the files cannot be written, or the judge has given no verdict; all else is printed by then.
    """
    problem: PrefoptError | None = None
    if folder is not None:
        try:
            found.write(folder)
        except PrefoptError as error:
            problem = error
    _print(found, None if problem else folder, json)
    if problem is not None:
        raise problem
    if found.tally is not None and found.tally.failed:
        raise PrefoptError(
            f"The judge gave no verdict on any of {found.tally.no_verdict} pairs: {found.first_reason}. The same "
            "command asks it again."
        )


def _print(found: "Samples", folder: Path | None, json: bool) -> None:
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict()))
        return
    from prefopt_cli.cli.sample_report import print_samples

    print_samples(found, standard_output(), folder)
