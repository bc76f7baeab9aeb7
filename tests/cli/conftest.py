"""The command line, run in this process (quick) or in one of its own (true to life)."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefopt_cli.cli.main import main
from tests.training.conftest import RECIPE


@pytest.fixture
def recipe(tiny_world: Path, tmp_path: Path) -> Path:
    """A recipe file of the tiny world, with `run` beside it as its output_dir."""
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "run"))
    return path


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Prefopt = Callable[..., Result]


@pytest.fixture
def prefopt(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Prefopt:
    """`prefopt("check", "my.yaml")` -> exit code and what was printed."""
    # main() restores neither: it usually ends the process.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def invoke(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["prefopt", *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return invoke


def in_a_process(
    *arguments: str, cwd: Path | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """`python -m prefopt_cli` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "prefopt_cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        **options,  # type: ignore[call-overload]
    )


def environment() -> dict[str, str]:
    """This process's, with the package found from any working directory."""
    repository = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": str(repository)}


def on_a_terminal(*arguments: str) -> str:
    """What a person sees on a real pseudo-terminal, escape sequences included."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", *arguments],
        stdout=follower,
        stderr=follower,
        env={**environment(), "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()
