"""Where policies come from, and what is said of those that come from elsewhere."""

import json
import shutil
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.sandbox.names import PreferencesName
from prefopt_cli.sandbox.origin import base_name, identity, origin, require_finished
from prefopt_cli.sandbox.replies import answers
from tests.sandbox.build import write_run


@pytest.mark.parametrize(("name", "seed"), [("sandbox:base", 0), ("sandbox:base/seed=3", 3)])
def test_a_base_policy(name: str, seed: int) -> None:
    found = origin(name)
    assert (found.seed, found.preferences, found.recipe, found.from_base) == (seed, (), None, False)
    assert base_name(seed) == name


def test_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "sandbox:base/seed=2", "sandbox:polite/temperature=0.5/seed=2")
    found = origin(str(run))
    assert found.seed == 2
    assert found.preferences == (PreferencesName("polite", 0.5, 2),)
    assert found.from_base
    assert found.recipe is not None
    assert found.recipe.method.beta == 0.5


def test_a_run_on_a_run(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "sandbox:base/seed=1")
    found = origin(str(write_run(tmp_path / "second", str(first), "sandbox:polite")))
    assert found.seed == 1
    assert not found.from_base
    assert [each.dimension for each in found.preferences] == ["polite"]


def test_a_manifest_knows_the_origin_where_the_ancestor_is_out_of_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's path is relative to where the run was trained; scored from elsewhere, it leads nowhere."""
    run = write_run(tmp_path / "second", "runs/first", "sandbox:polite/seed=1")
    (run / "manifest.json").write_text(
        json.dumps({"status": "finished", "lineage": {"origin": "sandbox:base/seed=1"}})
    )
    monkeypatch.chdir(tmp_path)
    found = origin(str(run))
    assert found.seed == 1
    assert not found.from_base


def test_data_of_elsewhere_is_no_preference_of_the_sandbox(tmp_path: Path) -> None:
    assert origin(str(write_run(tmp_path / "run", preferences="pairs.jsonl"))).preferences == ()


def test_names_of_one_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert identity("run") == identity("./run/") == identity(str(tmp_path / "run")) == identity("link")
    assert identity("sandbox:base") == identity("sandbox:base/seed=0") != identity("sandbox:base/seed=1")


def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "gpo-sandbox")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.yaml").write_text("")
    for name, said in {
        "": "has no name",
        "gpo-sandbx": "Did you mean gpo-sandbox?",
        "owner/model": "There is no run owner/model",
        "folder": "folder is no run folder",
        "file.yaml": "file.yaml is no run folder",
        "gpo-sandbox/model": "name the run itself: gpo-sandbox.",
        "sandbox:polite": "sandbox:polite is a dataset",
    }.items():
        with pytest.raises(UserError) as caught:
            origin(name)
        assert said in str(caught.value)


def test_a_run_of_another_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "Qwen/Qwen2.5-0.5B-Instruct")
    with pytest.raises(
        UserError, match=r"run was trained from Qwen/Qwen2\.5-0\.5B-Instruct, which is neither"
    ):
        origin(str(run))
    # The message names the run whose recipe says so, not its descendant.
    with pytest.raises(UserError, match=r"^\S+/run was trained from Qwen"):
        origin(str(write_run(tmp_path / "second", str(run))))


def test_a_run_whose_ancestor_has_gone(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", str(first))
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"second was trained from \S+/first, which is neither"):
        origin(str(second))


def test_runs_that_go_round_in_a_circle(tmp_path: Path) -> None:
    """The first was trained again, from what had been trained from it."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_run(first, str(second))
    write_run(second, str(first))
    with pytest.raises(UserError, match="trained anew"):
        origin(str(first))


def test_unfinished_runs(tmp_path: Path) -> None:
    require_finished("sandbox:base")
    require_finished(str(write_run(tmp_path / "finished")))
    run = write_run(tmp_path / "run", status="interrupted")
    with pytest.raises(UserError, match=r"status is 'interrupted'\).*--resume"):
        require_finished(str(run))
    (run / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="status is 'unknown'"):
        require_finished(str(run))


def test_replies_of_a_run_whose_world_nobody_knows_are_refused(tmp_path: Path) -> None:
    """Not asked for to prompts of some other world."""
    run = write_run(tmp_path / "second", "runs/gone", "sandbox:polite/seed=1")
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="trained from runs/gone, which is neither"):
        answers(str(run), 1, 1, seed=0)
