"""`prefopt cache`: what lies in the cache, and removing scores and tokenised data from it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt_cli.cli.common import DebugOption, JsonOption, standard_error, standard_output
from prefopt_cli.cli.tables import Column, print_line, print_table
from prefopt_cli.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from prefopt_cli.cli.cache_tokens import KeptTokens
    from prefopt_cli.scoring.cache_contents import Choice, Contents, KeptPolicy, Pruned

STANDARD_DAYS = 90
MOST_DAYS = 36_500

app = typer.Typer(
    name="cache",
    help="What prefopt keeps so as not to do it twice: scores of frozen policies, tokenised data, judges' verdicts, "
    "sandbox worlds.",
    epilog="Example: prefopt cache info",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def info(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say where the cache is, how large it is, and which policies' scores it holds.

    Nothing is changed.
    """
    from prefopt_cli.cli.cache_tokens import kept_tokens
    from prefopt_cli.runs.cache import cache_folder
    from prefopt_cli.scoring.cache_contents import describe

    contents, tokens = describe(), kept_tokens()
    sandbox, judge = cache_folder() / "sandbox", cache_folder() / "judge"
    sandbox_bytes, judge_bytes = _folder_bytes(sandbox), _folder_bytes(judge)
    if json:
        _print_json(
            folder=str(cache_folder()),
            scores=_to_json(contents),
            tokens=tokens.to_dict(),
            sandbox={"folder": str(sandbox), "bytes": sandbox_bytes},
            judge={"folder": str(judge), "bytes": judge_bytes},
        )
        return
    console = standard_output()
    print_line(console, f"cache: {cache_folder()}")
    print_line(console, f"  scores   {_size(contents.bytes):>9}  {contents.file}")
    print_line(console, f"  tokens   {_size(tokens.bytes):>9}  {tokens.folder} ({_sets(tokens)})")
    print_line(console, f"  sandbox  {_size(sandbox_bytes):>9}  {sandbox}")
    print_line(console, f"  judge    {_size(judge_bytes):>9}  {judge}")
    for line in _remarks(contents):
        print_line(console, line)
    if contents.policies:
        print_line(console)
        _print_policies(contents.policies, console)


def prune(
    unused_for: Annotated[
        int | None,
        typer.Option(
            "--unused-for",
            metavar="DAYS",
            min=0,
            max=MOST_DAYS,
            help=f"Scores and tokenised sets that no run has used for so long (standard: {STANDARD_DAYS}).",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="DIGEST",
            help="Scores of this policy, and nothing else: the first digits of its digest, from `prefopt cache info`.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every score and every tokenised set.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove scores of frozen policies and tokenised data; a run that needs them computes them again.

    Damaged files that were set aside go too.
    """
    from prefopt_cli.cli.cache_tokens import kept_tokens
    from prefopt_cli.scoring.cache_contents import prune as remove

    choice = _choice(unused_for, policy, every)
    messages = standard_error()
    pruned = remove(choice, lambda message: print_line(messages, message), dry_run=dry_run)
    tokens = kept_tokens().unused_for(choice.unused_for)
    if not dry_run:
        tokens.remove()
    if json:
        _print_json(
            dry_run=dry_run,
            bytes=pruned.bytes + tokens.bytes,
            responses=sum(each.responses for each in pruned.policies),
            policies=[each.to_dict() for each in pruned.policies],
            set_aside=[str(path) for path in pruned.set_aside],
            tokens=tokens.to_dict(),
        )
        return
    console = standard_output()
    for line in _said(pruned, tokens, dry_run):
        print_line(console, line)
    if pruned.policies:
        print_line(console)
        _print_policies(pruned.policies, console)


def _choice(unused_for: int | None, policy: str | None, every: bool) -> "Choice":
    from prefopt_cli.scoring.cache_contents import Choice

    if sum((unused_for is not None, policy is not None, every)) > 1:
        raise UserError("--unused-for, --policy and --all each say what to remove; give one of them.")
    if policy is not None:
        return Choice(prefix=policy)
    return Choice(unused_for=0 if every else STANDARD_DAYS if unused_for is None else unused_for)


def _remarks(contents: "Contents") -> "Iterator[str]":
    if contents.problem:
        yield contents.problem
    elif not contents.policies:
        yield "No scores are kept yet; the first run that needs a frozen policy's scores keeps them here."
    if contents.set_aside:
        yield (
            f"{_files(contents.set_aside)} set aside as damaged, with the scores; `prefopt cache prune` removes them."
        )


def _said(pruned: "Pruned", tokens: "KeptTokens", dry_run: bool) -> "Iterator[str]":
    if not pruned.policies and not pruned.set_aside and not tokens.files:
        yield "There is nothing to remove."
        return
    parts = []
    if pruned.policies:
        responses = sum(each.responses for each in pruned.policies)
        policies = "1 policy" if len(pruned.policies) == 1 else f"{len(pruned.policies)} policies"
        parts.append(f"{responses:,} responses of {policies}")
    if tokens.files:
        parts.append(_sets(tokens))
    if pruned.set_aside:
        parts.append(f"{_files(pruned.set_aside)} that had been set aside as damaged")
    begins, about = ("To be removed", "about ") if dry_run else ("Removed", "")
    yield f"{begins}: {' and '.join(parts)}, {about}{_size(pruned.bytes + tokens.bytes)}."


def _print_policies(policies: "Sequence[KeptPolicy]", console: "Console") -> None:
    from prefopt_cli.scoring.cache_contents import SHORT

    print_table(
        console,
        Column("policy", [" ".join(each.description.split()) for each in policies]),
        [
            Column("digest", [each.digest[:SHORT] for each in policies]),
            Column("responses", [f"{each.responses:,}" for each in policies]),
            Column("last used", [each.last_used for each in policies]),
        ],
    )


def _to_json(contents: "Contents") -> dict[str, Any]:
    return {
        "file": str(contents.file),
        "bytes": contents.bytes,
        "problem": contents.problem,
        "set_aside": [str(path) for path in contents.set_aside],
        "policies": [each.to_dict() for each in contents.policies],
    }


def _print_json(**values: Any) -> None:
    from json import dumps

    typer.echo(dumps(values))


def _folder_bytes(folder: "Path") -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _sets(tokens: "KeptTokens") -> str:
    return "1 tokenised set" if len(tokens.sets) == 1 else f"{len(tokens.sets)} tokenised sets"


def _files(paths: "Sequence[Path]") -> str:
    return "1 file" if len(paths) == 1 else f"{len(paths)} files"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


app.command(name="info", epilog="Example: prefopt cache info --json")(info)
app.command(name="prune", epilog="Example: prefopt cache prune --unused-for 30 --dry-run")(prune)
