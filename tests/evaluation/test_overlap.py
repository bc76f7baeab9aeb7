"""Held-out prompts that the training data has, too."""

from pathlib import Path

import pytest

from prefopt_cli.evaluation.overlap import Trained, TrainingPrompts
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Silent
from tests.evaluation.plain import evaluation, read
from tests.tiny import pairs, write_pairs
from tests.training.conftest import (
    Run,
    make_recipe,  # noqa: F401  (a fixture, as is the next)
    run,  # noqa: F401
)

SHORT = "training.max_steps=1"


@pytest.fixture
def stages(run: Run, tmp_path: Path) -> tuple[Path, Path]:  # noqa: F811
    """Two stages with training data of their own: 10 prompts, and 8 others."""
    write_pairs(tmp_path / "one.jsonl", pairs(10, seed=11))
    write_pairs(tmp_path / "two.jsonl", pairs(8, seed=12))
    first = run("first", SHORT, f"dataset.train={tmp_path}/one.jsonl").run.path
    second = run(
        "second", SHORT, f"dataset.train={tmp_path}/two.jsonl", f"model.name_or_path={first}"
    ).run.path
    return first, second


def trained_on(path: Path | None) -> Trained:
    return TrainingPrompts(RunFinder(), Silent()).of(RunFolder(path) if path else None)


def told(path: Path, data: Path) -> dict[str, int] | None:
    trained = trained_on(path)
    assert (trained.keys is None) == bool(trained.reason) == bool(trained.notes)
    (found,) = evaluation(path, data, known=trained.keys).to_dict()["sets"].values()
    return found["train_overlap"]


def test_prompts_of_a_run_and_of_those_before_it(stages: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = stages
    one, two = read(tmp_path / "one.jsonl"), read(tmp_path / "two.jsonl")
    # Prompts of either stage; one with other answers, one of them twice, and some that are new.
    other = {**one[3], "chosen": " Certainly.", "rejected": " Never."}
    mixture = [one[0], other, one[3], two[0], *pairs(5, seed=13)]
    write_pairs(tmp_path / "mixture.jsonl", mixture)
    assert told(first, tmp_path / "mixture.jsonl") == {"prompts": 2, "pairs": 3}
    assert told(second, tmp_path / "mixture.jsonl") == {"prompts": 3, "pairs": 4}
    write_pairs(tmp_path / "new.jsonl", pairs(5, seed=13))
    assert told(second, tmp_path / "new.jsonl") == {"prompts": 0, "pairs": 0}


def test_training_data_that_is_gone(stages: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = stages
    write_pairs(tmp_path / "new.jsonl", pairs(5, seed=13))
    (tmp_path / "one.jsonl").unlink()
    assert told(first, tmp_path / "new.jsonl") is None
    trained = trained_on(second)
    assert trained.keys is None
    (note,) = trained.notes
    assert note.startswith("Not checked whether the prompts occur in the training data: ")
    assert "one.jsonl: no such file" in note


def test_training_data_that_is_another_one_now(stages: tuple[Path, Path], tmp_path: Path) -> None:
    write_pairs(tmp_path / "one.jsonl", pairs(7, seed=14))
    trained = trained_on(stages[1])
    assert trained.keys is None
    assert trained.reason is not None
    assert trained.reason.endswith("has changed since (7 rows now, 10 then)")


def test_a_model_does_not_tell() -> None:
    assert trained_on(None) == Trained(None, "no run tells what the model was trained on")


def test_what_was_held_out_from_training_is_no_overlap(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """The holdout is of other prompts than the rest; the rest is not counted as held out."""
    write_pairs(tmp_path / "one.jsonl", pairs(20, seed=11))
    options = (f"dataset.train={tmp_path}/one.jsonl", "dataset.eval={}", "dataset.holdout=0.25")
    path = run("held", SHORT, *options).run.path
    known = trained_on(path).keys
    assert known is not None
    (found,) = evaluation(path, known=known).to_dict()["sets"].values()
    assert found["train_overlap"] == {"prompts": 0, "pairs": 0}
    assert len(known) + found["prompts"] == 20


def test_a_held_out_set_that_is_another_one_now(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Told where the run's own set has another number of rows; other data has nothing to be compared with."""
    own = tmp_path / "own.jsonl"
    write_pairs(own, pairs(6, seed=21))
    path = run("own", SHORT, f"dataset.eval={{own: {own}}}").run.path
    assert evaluation(path).sets["own"].notes == ()
    write_pairs(own, pairs(9, seed=22))
    (note,) = evaluation(path).sets["own"].notes
    assert note.startswith("The held-out set own has 9 rows now and had 6 when the run was trained")
    write_pairs(tmp_path / "more.jsonl", pairs(9, seed=22))
    assert evaluation(path, f"own={tmp_path}/more.jsonl").sets["own"].notes == ()
