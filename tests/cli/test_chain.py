"""`prefopt chain` on the command line."""

import json
from pathlib import Path

import pytest

from prefopt_cli.chain.loader import load_chain
from prefopt_cli.recipe.shipped import recipes_folder
from tests.chain.conftest import CHAIN
from tests.cli.conftest import Prefopt


@pytest.fixture
def chain(tiny_world: Path, tmp_path: Path) -> Path:
    """A chain's file, with `out` beside it as its output_dir."""
    path = tmp_path / "my.yaml"
    path.write_text(CHAIN.format(world=tiny_world, out=tmp_path / "out"))
    return path


def test_the_plan_says_what_would_be_done_and_does_nothing(
    prefopt: Prefopt, chain: Path, tmp_path: Path
) -> None:
    result = prefopt("chain", str(chain), "--dry-run")
    assert result.code == 0, result.err
    assert "1. tone: train, because it has not been trained yet." in result.out
    assert "Reference: the policy that stage tone ends with" in result.out
    assert "Lambdas: tone 0.5" in result.out
    assert "Scores under tone: not trained yet." in result.out
    assert not (tmp_path / "out").exists()
    as_json = prefopt("chain", str(chain), "--dry-run", "--json")
    assert [stage["action"] for stage in json.loads(as_json.out)["stages"]] == ["train", "train"]


def test_a_chain_is_trained_and_skipped_then(prefopt: Prefopt, chain: Path, tmp_path: Path) -> None:
    result = prefopt("chain", str(chain))
    assert result.code == 0, result.err
    assert "Stage 2 of 2, facts: train" in result.err
    assert result.out.count("margin, nats") >= 2  # a table after each stage
    assert str(tmp_path / "out" / "facts" / "model") in result.out
    again = prefopt("chain", str(chain))
    assert again.code == 0
    assert "Stage 2 of 2, facts: skip" in again.err
    assert "nothing was trained" in again.out
    told = json.loads(prefopt("chain", str(chain), "--json").out)
    assert told["status"] == "finished"
    assert [stage["status"] for stage in told["stages"]] == ["finished", "finished"]
    assert [stage["name"] for stage in told["retention"]["stages"]] == ["base", "tone", "facts"]


def test_an_interrupted_chain_says_how_to_go_on(
    prefopt: Prefopt, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefopt_cli.cli import progress
    from tests.training.test_resume import SignalAt

    class Line(progress.LineReporter):
        step = SignalAt.step
        _step, _number = 2, 2

    monkeypatch.setattr(progress, "reporter_for", lambda console, receipts: Line(console, receipts=receipts))
    result = prefopt("chain", str(chain), "method.beta=0.2")
    assert result.code == 130
    assert "Stopped in" in result.err
    assert "at step 2 of 3" in result.err
    assert f"prefopt chain {chain} method.beta=0.2" in result.err
    assert "Policy:" not in result.out


def test_interrupted_between_stages_it_says_so_too(
    prefopt: Prefopt, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefopt_cli.cli import progress

    class Line(progress.LineReporter):
        def message(self, text: str) -> None:
            if text.startswith("Stage 2"):
                raise KeyboardInterrupt
            super().message(text)

    monkeypatch.setattr(progress, "reporter_for", lambda console, receipts: Line(console, receipts=receipts))
    result = prefopt("chain", str(chain), "--overwrite", "--json")
    assert (result.code, result.out) == (130, "")
    assert f"What is done is kept. Go on with:\n  prefopt chain {chain}\n" in result.err


def test_mistakes_end_it_with_their_lines(prefopt: Prefopt, chain: Path) -> None:
    chain.write_text(chain.read_text().replace("lambdas: {tone: 0.5}", "lambdas: {tome: 0.5}"))
    result = prefopt("chain", str(chain))
    assert result.code == 2
    assert "my.yaml:22  stages.1.lambdas.tome: no stage is about 'tome'" in result.err
    assert "Traceback" not in result.err


def test_a_folder_of_moved_runs_must_be_there(prefopt: Prefopt, chain: Path, tmp_path: Path) -> None:
    result = prefopt("chain", str(chain), "--runs-dir", str(tmp_path / "nowhere"))
    assert result.code == 2
    assert "--runs-dir: there is no folder" in result.err


@pytest.mark.parametrize("name", ["chain-hh", "chain-sandbox"])
def test_a_shipped_chain_names_its_command_and_loads(name: str) -> None:
    path = recipes_folder() / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# prefopt chain recipes/{name}.yaml"
    assert max(map(len, lines)) <= 110
    assert len(load_chain(path).stages) >= 2
