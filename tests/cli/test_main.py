"""Start-up, help, completion, and how a command ends."""

import signal
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


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    program = (
        "import sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from prefopt_cli.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (130, "prefopt: Interrupted.\n")


WAITS = """\
import signal, sys, time
import prefopt_cli.recipe

def load_recipe(*_):
    if not {forks}:
        print("here", flush=True)
        time.sleep(60)
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(10)
    print(child.exitcode, flush=True)
    sys.exit()

prefopt_cli.recipe.load_recipe = load_recipe
sys.argv[1:] = ["check", "x.yaml"]
from prefopt_cli.__main__ import main
main()
"""
"""A command that takes long before anything obeys signals gently."""


def waiting(*, forks: bool = False, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WAITS.format(forks=forks)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **variables},
    )


def test_sigterm_is_told_of() -> None:
    process = waiting()
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "prefopt: Interrupted.\n")


def test_sigterm_ends_one_of_several_processes_at_once() -> None:
    """It may wait for the others in a library, where Python would not hear of the signal."""
    process = waiting(WORLD_SIZE="2")
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_forked_processes_can_be_terminated() -> None:
    out, err = waiting(forks=True).communicate(timeout=30)
    assert (out, err) == (f"{-signal.SIGTERM}\n", "")
