"""The `prefopt` command."""

import os
import sys
from typing import Annotated

import typer

from prefopt_cli import __version__
from prefopt_cli.cli import (
    cache,
    chain,
    check,
    compare,
    evaluate,
    lineage,
    merge,
    recipe,
    retention,
    sample,
    sandbox,
    train,
)
from prefopt_cli.cli.common import DebugOption, is_debug
from prefopt_cli.errors import PrefoptError

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="prefopt",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="train", epilog=train.EPILOG)(train.train)
app.command(name="check", epilog=check.EPILOG)(check.check)
app.command(name="eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(name="sample", epilog=sample.EPILOG)(sample.sample)
app.command(name="compare", epilog=compare.EPILOG)(compare.compare)
app.command(name="chain", epilog=chain.EPILOG)(chain.chain)
app.command(name="retention", epilog=retention.EPILOG)(retention.retention)
app.command(name="lineage", epilog=lineage.EPILOG)(lineage.lineage)
app.command(name="merge", epilog=merge.EPILOG)(merge.merge)
app.add_typer(recipe.app, name="recipe")
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(cache.app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prefopt {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: prefopt recipe new gpo --output my.yaml && prefopt check my.yaml")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Preference optimization of language models beyond plain DPO, from one YAML recipe."""


def main() -> None:
    """Run a command; end with one clear message and the right exit code.

    0 done, 1 something failed, 2 the input cannot work as it stands, 130 interrupted.
    """
    try:
        app()
    except PrefoptError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(
            f"Unexpected {type(error).__name__}: {error}\nThis is a bug in prefopt or in a library it uses. "
            "Run the command again with --debug for the traceback, and report it.",
            1,
        )


def _fail(message: str, exit_code: int) -> None:
    if is_debug():
        import traceback

        traceback.print_exc()
    typer.echo(f"prefopt: {message}", err=True)
    sys.exit(exit_code)
