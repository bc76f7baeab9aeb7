"""`prefopt train` as a person uses it."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Prefopt, environment, in_a_process, on_a_terminal


def test_lines_without_a_terminal(prefopt: Prefopt, recipe: Path, tmp_path: Path) -> None:
    result = prefopt("train", str(recipe), "training.max_steps=3")
    assert result.code == 0
    assert [line.split()[1] for line in result.err.splitlines() if line.startswith("step ")] == [
        "1/3",
        "2/3",
        "3/3",
    ]
    assert "eval heldout: loss" in result.err
    assert "model, as it is at the start." in result.err
    assert "96 pairs, 96 prompts" in result.err
    assert str(tmp_path / "run" / "model") in result.out
    assert "\x1b[" not in result.out + result.err
    for noise in ("Warning", "warn(", "%|"):
        assert noise not in result.err


def test_json_is_all_that_standard_output_gets(prefopt: Prefopt, recipe: Path) -> None:
    result = prefopt("train", str(recipe), "training.max_steps=2", "--json")
    summary = json.loads(result.out)
    assert summary["status"] == "finished"
    assert summary["step"] == summary["steps"] == 2
    assert summary["metrics"]["eval_heldout_rewards/accuracies"] >= 0
    assert Path(summary["model"]).is_dir()


def test_resume_and_overwrite_exclude_each_other(prefopt: Prefopt, recipe: Path) -> None:
    assert prefopt("train", str(recipe), "--resume", "--overwrite").code == 2


def test_finished_run_can_be_asked_to_resume(prefopt: Prefopt, recipe: Path) -> None:
    prefopt("train", str(recipe), "training.max_steps=2")
    again = prefopt("train", str(recipe), "training.max_steps=2", "--resume")
    assert again.code == 0
    assert "Already finished (2 steps): nothing to do." in again.out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_printed_command_goes_on(
    recipe: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "prefopt_cli", "train", str(recipe), "training.max_steps=400"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait(60) == code, "".join(lines) + rest
    assert "Traceback" not in rest
    stopped = int(re.search(r"Stopped at step (\d+) of 400", rest)[1])
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{stopped}" / "prefopt.json").is_file()
    (printed,) = [line.strip() for line in rest.splitlines() if line.strip().startswith("prefopt train")]
    # The same command with fewer steps would be another recipe; this one only has to go on and be stopped again.
    resumed = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", *shlex.split(printed)[1:]],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    with resumed:
        assert resumed.stderr is not None
        first = next(
            int(line.split()[1].split("/")[0]) for line in resumed.stderr if line.startswith("step ")
        )
        resumed.kill()
    assert first == stopped + 1


def test_bar_on_a_terminal(recipe: Path) -> None:
    """A real pseudo-terminal: the bar shows steps, time left and figures, and leaves the last line whole."""
    shown = on_a_terminal("train", str(recipe), "training.max_steps=8")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"training .*8/8 .*left.*loss [\d.e-]+ +acc [\d.]+ +margin", text), text[-2000:]
    assert "Policy: " in text


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["prefopt", *sys.argv[1:]]
from prefopt_cli.cli.main import main
main()
"""


def train_with_file_limit(recipe: Path, limit: int) -> "subprocess.CompletedProcess[str]":
    """Train where no file may grow beyond `limit` bytes, which ends as on a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=limit), "train", str(recipe)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "No space left" in done.stderr
    return done


@pytest.mark.slow
def test_disk_that_is_full_from_the_start(recipe: Path, tmp_path: Path) -> None:
    assert in_a_process("check", str(recipe)).returncode == 0
    train_with_file_limit(recipe, 1_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml"]


@pytest.mark.slow
def test_full_disk(recipe: Path, tmp_path: Path) -> None:
    """No file may grow beyond 250 kB: the weights fit, the optimizer's states do not."""
    # Whatever the data library caches must be there before.
    assert in_a_process("check", str(recipe)).returncode == 0
    done = train_with_file_limit(recipe, 250_000)
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "run"
    assert list((run / "checkpoints").glob("checkpoint-*")) == []
    assert not (run / "model").exists()
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    # With room again, the run goes on.
    assert in_a_process("train", str(recipe), "--resume").returncode == 0
    assert (run / "model" / "model.safetensors").is_file()
