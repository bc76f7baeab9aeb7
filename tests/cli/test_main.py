"""Start-up, help, completion, and how a command ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Prefopt, environment, in_a_process

COMMANDS = [
    (),
    ("train",),
    ("check",),
    ("eval",),
    ("compare",),
    ("sample",),
    ("chain",),
    ("retention",),
    ("lineage",),
    ("merge",),
    ("doctor",),
    ("launch",),
    ("launch", "print"),
    ("launch", "slurm"),
    ("launch", "skypilot"),
    ("recipe",),
    ("recipe", "list"),
    ("recipe", "show"),
    ("recipe", "new"),
    ("recipe", "schema"),
    ("sandbox",),
    ("sandbox", "build"),
    ("sandbox", "info"),
    ("sandbox", "sample"),
    ("cache",),
    ("cache", "info"),
    ("cache", "prune"),
]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "yaml", "numpy"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_ends_in_an_example(prefopt: Prefopt, command: tuple[str, ...]) -> None:
    result = prefopt(*command, "--help")
    assert result.code == 0
    example = result.out.rstrip().splitlines()[-1].strip()
    assert example.startswith("Example: prefopt "), example


def test_help_imports_nothing_heavy() -> None:
    """What makes --help slow is imports; they are counted, because seconds depend on the machine."""
    program = (
        "import sys; sys.argv = ['prefopt', 'train', '--help']\n"
        "from prefopt_cli.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stderr.strip() == "[]"


def test_completion_knows_the_commands() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("prefopt")],
        capture_output=True,
        text=True,
        env={
            **environment(),
            "_PREFOPT_COMPLETE": "complete_bash",
            "COMP_WORDS": "prefopt ",
            "COMP_CWORD": "1",
        },
    )
    assert {"train", "check", "recipe", "sandbox", "cache"} <= set(done.stdout.split())


def test_version(prefopt: Prefopt) -> None:
    assert prefopt("--version").out.startswith("prefopt 0.")


def test_unknown_command_and_option(prefopt: Prefopt) -> None:
    assert prefopt("trian").code == 2
    assert prefopt("train", "--overwite", "x.yaml").code == 2


def test_debug_shows_the_traceback(prefopt: Prefopt, tmp_path) -> None:
    missing = str(tmp_path / "none.yaml")
    plain, debug = prefopt("train", missing), prefopt("train", missing, "--debug")
    assert (plain.code, debug.code) == (2, 2)
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err


def test_unexpected_failure_is_one_message(prefopt: Prefopt, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefopt_cli.recipe

    def broken(*arguments: object) -> None:
        raise RuntimeError("the moon is in the wrong place")

    monkeypatch.setattr(prefopt_cli.recipe, "load_recipe", broken)
    result = prefopt("train", "x.yaml")
    assert result.code == 1
    assert "the moon is in the wrong place" in result.err
    assert "--debug" in result.err
    assert "Traceback" not in result.err


def test_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m prefopt_cli recipe schema | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.stdout
    assert done.stderr == ""


def test_module_runs_like_the_command() -> None:
    assert in_a_process("--version").stdout.startswith("prefopt 0.")
