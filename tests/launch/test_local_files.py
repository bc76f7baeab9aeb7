"""Files that SkyPilot's machines will not have, each with what brings it there."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.launch.local_files import absent_files
from prefopt_cli.launch.skypilot_mounts import read_mounts
from prefopt_cli.recipe import load_recipe

RECIPE: dict[str, Any] = {
    "model": {"name_or_path": "sandbox:base"},
    "dataset": {"train": "sandbox:helpful"},
    "method": {"name": "gpo"},
    "output_dir": "runs/mine",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder; beside it lies what is not copied."""
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    (folder / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def absent(*mounts: str, **changes: Any) -> list[str]:
    Path("my.yaml").write_text(json.dumps({**RECIPE, **changes}))
    return absent_files("my.yaml", load_recipe("my.yaml"), read_mounts(mounts, ()))


def test_what_is_copied_is_there(here: Path) -> None:
    assert absent() == []
    assert absent(dataset={"train": "rows.jsonl"}, model={"name_or_path": "owner/name"}) == []


@pytest.mark.parametrize("kind", ["absolute", "home", "beside"])
def test_outside_the_present_folder(here: Path, kind: str) -> None:
    path = {"absolute": f"{here.parent}/rows.jsonl", "home": "~/rows.jsonl", "beside": "../rows.jsonl"}[kind]
    (told,) = absent(dataset={"train": path})
    assert told.startswith(f"dataset.train.0.source {path} lies outside the present folder")
    mount = told.partition("--mount ")[2].strip("'")
    place = "~/rows.jsonl" if kind == "beside" else path
    assert mount == f"{place}={path}"
    assert absent(mount, dataset={"train": path}) == []


def test_a_full_path_into_the_present_folder(here: Path) -> None:
    (told,) = absent(dataset={"train": str(here / "rows.jsonl")})
    assert told.endswith("Write rows.jsonl in the recipe.")


def test_not_here_and_perhaps_there(here: Path) -> None:
    (told,) = absent(dataset={"train": "/nowhere/rows.jsonl"})
    assert told.endswith("--mount /nowhere=s3://BUCKET")


def test_a_link_leads_nowhere(here: Path) -> None:
    (here / "link.jsonl").symlink_to("../rows.jsonl")
    (told,) = absent(dataset={"train": "link.jsonl"})
    assert "by a link" in told


def test_every_setting_that_names_a_file(here: Path) -> None:
    outside = "/nowhere/x"
    told = absent(
        model={"name_or_path": outside, "chat_template": outside},
        dataset={"train": ["sandbox:helpful", outside], "eval": {"held": outside}},
        method={
            "name": "self_supervised",
            "align": {"name": "soft", "regularizer": {"prompts": outside}},
            "stopwords": outside,
        },
        launch={"config": outside},
    )
    assert [each.partition(" ")[0] for each in told] == [
        "model.name_or_path",
        "model.chat_template",
        "dataset.train.1.source",
        "dataset.eval.held.0.source",
        "method.align.regularizer.prompts.0.source",
        "method.stopwords",
        "launch.config",
    ]
    sequential = {"name": "sequential", "previous": [outside], "lambdas": 0.5}
    assert absent(method=sequential)[0].startswith("method.previous.0 ")


def test_the_base_of_an_adapter(here: Path) -> None:
    (here / "run/model").mkdir(parents=True)
    base = here / "base"
    base.mkdir()
    (here / "run/model/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (told,) = absent(model={"name_or_path": "run"})
    assert told.endswith(f"--mount {base}={base}")
    assert absent(f"{base}={base}", model={"name_or_path": "run"}) == []
    (here / "run/manifest.json").write_text(json.dumps({"lineage": {"name": "sandbox:base"}}))
    assert absent(model={"name_or_path": "run"}) == []


def test_ones_own_loss_lies_beside_the_recipe(here: Path) -> None:
    method = {"name": "gpo", "loss": "mine.losses:f"}
    (told,) = absent(method=method)
    assert told.startswith("method.loss: the module mine is not beside the recipe")
    (here / "mine").mkdir()
    assert absent(method=method) == []
    assert absent(method={"name": "gpo", "loss": "torch.nn.functional:softplus"}) == []


def test_what_git_ignores_is_not_copied(here: Path) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    (here / ".gitignore").write_text("*.jsonl\n*.bin\nmine.py\nmy.yaml\n")
    (here / "model").mkdir()
    (here / "model/weights.bin").write_text("")
    (here / "mine.py").write_text("")
    changes = {
        "model": {"name_or_path": "model"},
        "dataset": {"train": "rows.jsonl"},
        "method": {"name": "gpo", "loss": "mine:f"},
    }
    told = absent(**changes)
    assert len(told) == 4
    assert all("is ignored by git" in each for each in told)
    (here / ".skyignore").write_text("")
    assert absent(**changes) == []
