"""What a job's container sees: every folder and file of the run, under its own path."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.launch.batch_script import training
from prefopt_cli.launch.slurm import script_of
from prefopt_cli.launch.slurm_container import container_mounts
from prefopt_cli.launch.slurm_options import SlurmOptions
from prefopt_cli.recipe import load_recipe

RECIPE = """\
model: {name_or_path: sandbox:base}
dataset: {train: sandbox:helpful}
method: {name: gpo, beta: 0.1}
output_dir: runs/a run
"""

Mounts = Callable[..., list[str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a recipe in it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mounts(here: Path) -> Mounts:
    """What is mounted for the recipe with overrides."""

    def found(
        *overrides: str, path: str = "my.yaml", asked: tuple[str, ...] = (), **environ: str
    ) -> list[str]:
        work = training(path, overrides, load_recipe(path, overrides))
        return container_mounts(work, asked, environ).split(",")

    return found


def same(*places: Path) -> list[str]:
    return [f"{place}:{place}" for place in places]


def test_the_present_folder_holds_most(mounts: Mounts, here: Path) -> None:
    (here / "train").mkdir()  # as the name of a split
    assert mounts() == same(here)


def test_output_dir_elsewhere(mounts: Mounts, here: Path, tmp_path: Path) -> None:
    """The folder above the run's: a run is made beside itself and replaced."""
    assert mounts(f"output_dir={tmp_path}/out/a/run") == same(here, tmp_path / "out/a")
    assert mounts("output_dir=../run") == same(tmp_path)


def test_what_the_recipe_names_elsewhere(mounts: Mounts, here: Path, tmp_path: Path) -> None:
    for name in ("models/base", "data", "recipes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/train.jsonl", "data/test.jsonl", "ds.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "recipes/other.yaml").write_text(RECIPE)
    named = [
        f"model.name_or_path={tmp_path}/models/base",
        f"dataset.train=[{{source: {tmp_path}/data/train.jsonl}}, {{source: org/on-the-hub}}]",
        "dataset.eval.held_out=../data/test.jsonl",
        f"launch.config={tmp_path}/ds.json",
        "launch.engine=deepspeed",
    ]
    found = mounts(*named, path="../recipes/other.yaml")
    files = ("data/test.jsonl", "data/train.jsonl", "ds.json", "models/base", "recipes")
    assert sorted(found) == sorted(same(here, *(tmp_path / name for name in files)))


def test_links_lead_somewhere(mounts: Mounts, here: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch/data").mkdir(parents=True)
    (tmp_path / "scratch/runs").mkdir()
    (here / "runs").symlink_to(tmp_path / "scratch/runs")
    (here / "data").symlink_to(tmp_path / "scratch/data")
    assert mounts("dataset.train=data") == same(
        here, *(tmp_path / "scratch" / name for name in ("runs", "data"))
    )


def test_caches_that_the_environment_names(mounts: Mounts, here: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    assert mounts(HF_HOME=f"{tmp_path}/hub", PREFOPT_CACHE=f"{tmp_path}/none") == same(here, tmp_path / "hub")


def test_the_users_own_come_first(mounts: Mounts, here: Path, tmp_path: Path) -> None:
    """Outer ones before inner ones, which would otherwise be hidden."""
    assert mounts(asked=(str(tmp_path),)) == same(tmp_path)
    assert mounts(asked=(f"{here}/data:/data", "/scratch/")) == [
        *(f"{here}/data:/data", "/scratch:/scratch"),
        *same(here),
    ]
    inner = f"/scratch/data:{here}/data"
    assert mounts(asked=(inner,)) == [*same(here), inner]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("data", "--container-mount: expected /FOLDER or"),
        ("/a:b", "expected /FOLDER or"),
        ("/a:", "expected /FOLDER or"),
        ("/a:/b:ro", "expected /FOLDER or"),
        ("/", "the root folder / cannot be mounted"),
        ("/data:/", "the root folder / cannot be mounted"),
        ("/a,b", "no way to write ',' in a path"),
        ("/a b:/c", "no way to write ' ' in a path"),
    ],
)
def test_mounts_that_cannot_be(mounts: Mounts, asked: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        mounts(asked=(asked,))
    assert words in str(raised.value)


@pytest.mark.parametrize("name", ["a,b", "a:b", "a b", "$HOME", "it's"])
def test_folders_that_pyxis_cannot_mount(
    mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as raised:
        mounts()
    assert f"--container: {folder} cannot be mounted in the container" in str(raised.value)


def test_the_root_is_no_place_to_work_in(mounts: Mounts, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="the root folder / cannot be mounted"):
        mounts(path=f"{here}/my.yaml")


def test_output_dir_at_the_root(mounts: Mounts, here: Path) -> None:
    with pytest.raises(UserError, match="choose an output_dir like /runs/NAME"):
        mounts("output_dir=/run-of-mine")
    assert mounts("output_dir=/runs/mine", asked=("/disk:/runs",)) == ["/disk:/runs", *same(here)]


def test_the_container_has_another_home(
    mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.jsonl").write_text("{}")
    for override in ("output_dir=~/run", "dataset.train=~/pairs.jsonl"):
        with pytest.raises(UserError) as raised:
            mounts(override)
        place = override.partition("~")[2]
        assert f"Write it out: {tmp_path}{place}" in str(raised.value)


def test_the_script(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HOME", f"{tmp_path}/hub")
    monkeypatch.delenv("PREFOPT_CACHE", raising=False)
    overrides = [f"output_dir={tmp_path}/out/run"]
    work = training("my.yaml", overrides, load_recipe("my.yaml", overrides))
    options = SlurmOptions(nodes=1, container="lab/image:1", container_mounts=["/scratch:/data"])
    text = script_of(work, options)
    (step,) = (line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(step)
    assert "--container-image=lab/image:1" in words
    assert f"--container-workdir={here}" in words
    (mounted,) = (word for word in words if word.startswith("--container-mounts="))
    places = [f"{tmp_path}/{name}:{tmp_path}/{name}" for name in ("project", "out", "hub")]
    assert sorted(mounted.partition("=")[2].split(",")) == sorted(["/scratch:/data", *places])
    assert f"mkdir -p -- {tmp_path}/out " in text, "pyxis mounts only what is there"
    assert f"export HF_HOME={tmp_path}/hub\n" in text
    assert "export PATH=" not in text, "the programs are the image's"


def test_a_run_below_a_mount_of_the_users_is_found_outside(here: Path, tmp_path: Path) -> None:
    """The script runs outside, where the folder has another name."""
    overrides = ["output_dir=/runs/deep/mine"]
    work = training("my.yaml", overrides, load_recipe("my.yaml", overrides))
    mounts = ["/elsewhere:/runs/deep/mine/data", f"{tmp_path}/disk:/runs", "/other"]
    text = script_of(work, SlurmOptions(nodes=1, container="lab/image:1", container_mounts=mounts))
    assert f"record={tmp_path}/disk/deep/mine/manifest.json\n" in text
    assert f"mkdir -p -- {tmp_path}/disk/deep " in text
