"""What a score leaves on disk."""

import json
import os
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.sandbox.results import draw, require_picture_path, save, write_picture
from prefopt_cli.sandbox.score import Report
from tests.sandbox.build import write_run
from tests.sandbox.test_score import BASE, report, seen


def scored(*runs: Path) -> Report:
    """A report on runs that are all alike."""
    return report(*(seen(str(run), [[1.0, 2.0], [2.0, 0.0]]).score(BASE) for run in runs))


def test_every_run_gets_the_whole_report(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    made = scored(first, second)
    saved = save(made)
    summaries = [run / "eval" / "sandbox" / "summary.json" for run in (first, second)]
    assert saved.written == [*summaries, first / "eval" / "sandbox" / "kl_win_rate.png"]
    assert saved.failed == {}
    for summary in summaries:
        assert json.loads(summary.read_text()) == json.loads(json.dumps(made.to_dict()))
    # Again, over what is there.
    assert save(made).written == saved.written


def test_the_picture_of_one_run_is_drawn_where_it_is_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert [path.name for path in save(scored(run)).written] == ["summary.json"]
    assert save(scored(run), tmp_path / "my.PNG").written[-1] == tmp_path / "my.PNG"
    assert (tmp_path / "my.PNG").read_bytes().startswith(b"\x89PNG")


def test_policies_that_are_no_runs_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(report(BASE.score(BASE))).written == []
    assert list(tmp_path.iterdir()) == []
    run = write_run(tmp_path / "a")
    made = report(BASE.score(BASE), seen(str(run), [[1.0, 2.0], [2.0, 0.0]]).score(BASE))
    assert [path.parent for path in save(made).written] == [run / "eval" / "sandbox"] * 2


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_report_the_same_picture(tmp_path: Path, suffix: str) -> None:
    made = scored(write_run(tmp_path / "a"), write_run(tmp_path / "b$ {"))
    for name in ("one", "two"):
        write_picture(made, tmp_path / f"{name}{suffix}")
    one, two = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    assert b"<dc:date>" not in one
    assert not list(tmp_path.glob(".*"))


def test_what_the_picture_shows(tmp_path: Path) -> None:
    made = scored(tmp_path / "runs" / "low", tmp_path / "runs" / "high")
    (axes,) = draw(made).axes
    assert [text.get_text() for text in axes.texts] == ["low", "high"]
    assert axes.get_ylabel() == "win rate by helpful against sandbox:base (%)"
    assert axes.texts[0].xy == pytest.approx((0.0, 56.25))
    # A policy against itself has no room between its mean and the ends of its interval.
    draw(report(BASE.score(BASE)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("picture.pdf", ".png or .svg"),
        ("picture", ".png or .svg"),
        ("", ".png or .svg"),
        ("nowhere/picture.png", "there is no folder nowhere"),
        ("folder.png", "this is a folder"),
    ],
)
def test_pictures_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError) as caught:
        require_picture_path(Path(path))
    assert said in str(caught.value)


def test_what_cannot_be_written_does_not_stop_the_rest(tmp_path: Path) -> None:
    """A file stands where a folder should be, which stops every user, root too."""
    blocked, free = write_run(tmp_path / "blocked"), write_run(tmp_path / "free")
    (blocked / "eval").write_text("in the way")
    saved = save(scored(blocked, free))
    assert saved.written == [free / "eval" / "sandbox" / "summary.json"]
    assert set(saved.failed) == {
        blocked / "eval" / "sandbox" / name for name in ("summary.json", "kl_win_rate.png")
    }
    assert all(reason == os.strerror(20) for reason in saved.failed.values())
