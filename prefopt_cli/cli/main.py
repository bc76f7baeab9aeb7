"""The `prefopt` command."""

import os
import sys
from contextlib import nullcontext
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from prefopt_cli import __version__
from prefopt_cli.cli import (
    cache,
    chain,
    check,
    compare,
    doctor,
    evaluate,
    launch,
    lineage,
    merge,
    recipe,
    retention,
    sample,
    sandbox,
    train,
)
from prefopt_cli.cli.common import SIGNAL_EXIT_BASE, DebugOption, is_debug
from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch import worker
from prefopt_cli.launch.connection import CONNECTION_LOST, is_connection_loss
from prefopt_cli.launch.failures import Kind
from prefopt_cli.launch.signals import INTERRUPTING, end_by_exit_code, interrupted_by, interruptible


class _Interrupted(BaseException):
    """A KeyboardInterrupt on its way through typer, which would end the process without a word for it."""


class _Group(TyperGroup):
    """The commands; what interrupts one of them reaches `main`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    name="prefopt",
    cls=_Group,
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
app.command(name="doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.add_typer(launch.app, name="launch")
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

    0 done, 1 something failed, 2 the input cannot work as it stands, 130 or 143 interrupted by Ctrl-C or SIGTERM.
    """
    try:
        worker.begin()
        with nullcontext() if worker.launched() else interruptible():
            app()
    except PrefoptError as error:
        _fail(str(error), error.exit_code, "consequence" if is_connection_loss(error) else "error")
    except (KeyboardInterrupt, _Interrupted) as error:
        cause = error if isinstance(error, KeyboardInterrupt) else error.__cause__
        assert isinstance(cause, KeyboardInterrupt)
        _interrupted(cause)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python must not complain about it at exit.
        worker.leave_failure("nobody reads its output any more.", 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if INTERRUPTING.raised is not None:
            _interrupted(INTERRUPTING.raised)  # what a library has made of it
        if is_connection_loss(error):
            _fail(CONNECTION_LOST, 1, "consequence")
        _fail(
            f"Unexpected {type(error).__name__}: {error}\nThis is a bug in prefopt or in a library it uses. "
            "Run the command again with --debug for the traceback, and report it.",
            1,
        )


def _interrupted(error: KeyboardInterrupt) -> NoReturn:
    end_by_exit_code()
    _fail("Interrupted.", SIGNAL_EXIT_BASE + interrupted_by(error))


def _fail(message: str, exit_code: int, kind: Kind = "error") -> NoReturn:
    """Print what went wrong, or leave it to the launcher of this process; end."""
    if is_debug():
        import traceback

        traceback.print_exc()
    if not worker.leave_failure(message, exit_code, kind):
        typer.echo(f"prefopt: {message}", err=True)
    sys.exit(exit_code)
