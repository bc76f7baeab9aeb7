"""The task file for SkyPilot: its text, what its scripts really ask for, and how prefopt gets onto the machines."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt_cli.errors import UserError
from prefopt_cli.launch import batch_script, installation
from prefopt_cli.launch.skypilot import SkyOptions, notes, skypilot_task, start_command
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from tests.cli.conftest import (
    Prefopt,
    prefopt,  # noqa: F401  (the fixture)
)
from tests.launch import fake_slurm

RECIPE = """\
model: {name_or_path: sandbox:base}
dataset: {train: sandbox:helpful}
method: {name: gpo, beta: 0.1}
output_dir: /runs/mine
"""

RECORD = 'import json\njson.dump(sys.argv[1:], open(os.path.join(HERE, "asked"), "w"))\n'

Task = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def task(folder: Path) -> Task:
    """A task as YAML reads it; both of its scripts are sound for bash."""

    def write(*overrides: str, nodes: int = 1, **options: Any) -> dict[str, Any]:
        path = "my recipe.yaml"
        text = skypilot_task(
            path, overrides, load_recipe(path, overrides), SkyOptions(nodes=nodes, **options)
        )
        (folder / "task.yaml").write_text(text)
        found: dict[str, Any] = yaml.safe_load(text)
        for part in ("setup", "run"):
            subprocess.run(["bash", "-n"], input=found[part], text=True, check=True)
        return found

    return write


def asked(script: str, folder: Path, **variables: str) -> list[str]:
    """What the run's script asks prefopt for."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    fake_slurm.write_program(programs / "prefopt", RECORD)
    home = folder / "home/prefopt-environment/bin"
    home.mkdir(parents=True, exist_ok=True)
    (home / "activate").write_text(f"PATH={programs}:$PATH\n")
    environment = {**os.environ, **variables, "HOME": str(folder / "home")}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    return list(json.loads((programs / "asked").read_text()))


def test_what_is_asked_of_the_cloud(task: Task) -> None:
    found = task(
        nodes=2,
        accelerators="H100:8",
        cloud="gcp/us-central1",
        spot=True,
        disk_size=500,
        mounts=["/sets/=s3://bucket", "~/data=/home/me/data/"],
        volumes=["/runs=my-volume"],
    )
    assert found["name"] == "my-recipe"
    assert found["num_nodes"] == 2
    assert found["workdir"] == "."
    assert found["resources"] == {
        "accelerators": "H100:8",
        "infra": "gcp/us-central1",
        "use_spot": True,
        "disk_size": 500,
    }
    mounts = found["file_mounts"]
    assert mounts["/sets"] == {"source": "s3://bucket", "mode": "MOUNT"}
    assert mounts["~/data"] == "/home/me/data"
    assert found["volumes"] == {"/runs": "my-volume"}


@pytest.mark.parametrize(
    ("output_dir", "place"),
    [("/runs/mine", "/runs"), ("~/runs/mine", "~/runs"), ("runs/mine", "~/sky_workdir/runs")],
)
def test_the_bucket_that_holds_the_run_can_be_appended_to(task: Task, output_dir: str, place: str) -> None:
    found = task(f"output_dir={output_dir}", mounts=[f"{place}=s3://mine", "/data=gs://rows"])["file_mounts"]
    assert found[place]["mode"] == "MOUNT_CACHED"
    assert found[place]["config"] == {"mount_cached": {"transfers": 1}}
    assert found["/data"]["mode"] == "MOUNT"


def test_several_machines_cannot_share_a_bucket(task: Task) -> None:
    with pytest.raises(UserError, match="--volume /runs=NAME"):
        task(nodes=2, mounts=["/runs=s3://bucket"])
    deeper = task("output_dir=/runs/v/a", nodes=2, mounts=["/runs=s3://bucket"], volumes=["/runs/v=mine"])
    assert deeper["file_mounts"]["/runs"]["mode"] == "MOUNT"


@pytest.mark.parametrize("options", [{"mounts": ["/runs/mine=s3://bucket"]}, {"volumes": ["/runs/mine=v"]}])
def test_a_mount_is_no_run_folder(task: Task, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="add output_dir=/runs/mine/NAME"):
        task(**options)


def test_one_machine(task: Task, folder: Path) -> None:
    override = "dataset.train={source: 'sandbox:helpful'}"
    found = task(override, accelerators="A100:4")
    assert asked(found["run"], folder, SKYPILOT_NUM_GPUS_PER_NODE="4") == [
        *("train", "my recipe.yaml", override, "launch.processes=4"),
    ]


def test_several_machines_and_a_run_that_has_begun(task: Task, folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    found = task(f"output_dir={out}", nodes=2)
    variables = {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    }
    assert asked(found["run"], folder, **variables) == [
        *("train", "my recipe.yaml", f"output_dir={out}", "launch.machines=2"),
        *("launch.rendezvous=10.0.0.4:29500", "launch.machine_rank=1", "--resume"),
    ]


def test_torch_comes_first_and_of_the_version_at_hand(task: Task) -> None:
    lines = [line for line in task()["setup"].splitlines() if line.startswith("pip install")]
    torch = metadata.version("torch").partition("+")[0]
    assert lines[0] == f"pip install torch=={torch}"
    for name in ("trl", "transformers", "peft", "accelerate"):
        assert f" {name}=={metadata.version(name)}" in lines[1]


@pytest.mark.parametrize(
    ("record", "requirement", "copied"),
    [
        ("{}", "prefopt==", False),
        (
            '{"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
            "git+https://x",
            False,
        ),
        ('{"url": "file:///SOURCE", "dir_info": {"editable": true}}', "", True),
        ('{"url": "file:///gone", "dir_info": {}}', "prefopt==", False),
        ("damaged", "prefopt==", False),
    ],
)
def test_prefopt_comes_from_where_it_came_from_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: str, requirement: str, copied: bool
) -> None:
    source = tmp_path / "a folder"
    source.mkdir()
    (source / "pyproject.toml").write_text("")

    class Distribution:
        def read_text(self, name: str) -> str:
            assert name == "direct_url.json"
            return record.replace("/SOURCE", str(source).replace(" ", "%20"))

    monkeypatch.setattr(installation.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(installation.metadata, "distribution", lambda name: Distribution())
    found = installation.installation()
    assert requirement in found.prefopt
    assert found.folder == (source if copied else None)


def test_a_source_folder_is_copied_unless_it_is_the_present_one(
    task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder / "source"
    monkeypatch.setattr(installation, "_origin", lambda: (source, ""))
    found = task()
    assert found["file_mounts"] == {"~/prefopt-source": str(source)}
    assert found["setup"].splitlines()[-2].endswith(" ~/prefopt-source")
    monkeypatch.setattr(installation, "_origin", lambda: (folder, ""))
    found = task()
    assert "file_mounts" not in found
    assert found["setup"].splitlines()[-2].endswith(" .")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accelerators": "8 of them"}, "--accelerators: expected"),
        ({"mounts": ["bucket"]}, "--mount: expected"),
        ({"volumes": ["~/runs=v"]}, "--volume: expected"),
        ({"volumes": ["/runs=s3://v"]}, "--volume: expected"),
        ({"cloud": "a\nb"}, "--cloud: expected one line"),
    ],
)
def test_what_skypilot_does_not_understand(task: Task, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        task(**options)
    assert words in str(raised.value)


def test_a_recipe_that_would_not_be_copied(folder: Path) -> None:
    (folder / "below").mkdir()
    os.chdir(folder / "below")
    recipe = load_recipe("../my recipe.yaml")
    with pytest.raises(UserError) as raised:
        skypilot_task("../my recipe.yaml", (), recipe, SkyOptions(nodes=1))
    assert "outside the present folder" in str(raised.value)


def test_the_command_writes_a_new_file(folder: Path, prefopt: Prefopt) -> None:  # noqa: F811
    path = "my recipe.yaml"
    printed = prefopt("launch", "skypilot", path)
    assert printed.code == 0
    assert yaml.safe_load(printed.out)["num_nodes"] == 1
    assert prefopt("launch", "skypilot", path, "-o", "task.yaml").code == 0
    assert (folder / "task.yaml").read_text() == printed.out
    refused = prefopt("launch", "skypilot", path, "-o", "task.yaml", "--nodes", "2")
    assert refused.code == 2
    assert (folder / "task.yaml").read_text() == printed.out


def test_several_machines_must_share_the_run_folder(folder: Path, prefopt: Prefopt) -> None:  # noqa: F811
    command = ("launch", "skypilot", "my recipe.yaml", "--nodes", "2")
    several = prefopt(*command)
    assert (several.code, "mount a volume" in several.err) == (0, True)
    assert prefopt(*command, "--mount", "/runs=s3://bucket").code == 2
    shared = prefopt(*command, "--volume", "/runs=mine")
    assert (shared.code, shared.err) == (0, "")


def test_how_it_is_started(folder: Path, prefopt: Prefopt) -> None:  # noqa: F811
    for spot, command in (
        ((), "sky launch --cluster my-recipe"),
        (("--spot",), "sky jobs launch --name my-recipe"),
    ):
        told = prefopt(
            *("launch", "skypilot", "my recipe.yaml", "--mount", "/runs=s3://b", *spot),
            *("-o", "a task.yaml", "--overwrite"),
        )
        assert told.err == f"Wrote a task.yaml. Start it: {command} 'a task.yaml'\n"
        head = (folder / "a task.yaml").read_text().split("name:")[0]
        assert head.splitlines()[0].endswith(f": {command} FILE")
        assert ("output_dir must outlive it" in head) == bool(spot)


def test_the_page_says_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs/cluster.md").read_text(encoding="utf-8")
    for spot in (True, False):
        assert f"`{start_command('my.yaml', SkyOptions(nodes=1, spot=spot), 'sky.yaml')}`" in page


def test_what_is_on_a_spot_machine_is_gone_with_it(folder: Path) -> None:
    recipe = load_recipe("my recipe.yaml")
    (note,) = notes("my recipe.yaml", recipe, SkyOptions(nodes=1, spot=True))
    assert "--mount /runs=s3://BUCKET" in note
    assert not notes("my recipe.yaml", recipe, SkyOptions(nodes=1, spot=True, mounts=["/runs=s3://b"]))
    (note,) = notes("my recipe.yaml", recipe, SkyOptions(nodes=1, spot=True, mounts=["/runs=./runs"]))
    assert "own disks" in note


def test_the_setup_examines_what_will_run(task: Task) -> None:
    override = "dataset.train={source: 'sandbox:helpful'}"
    assert (
        f"prefopt doctor --quick 'my recipe.yaml' {shlex.quote(override)} || true" in task(override)["setup"]
    )


def test_skypilot_reads_it(task: Task, folder: Path) -> None:
    """SkyPilot's own reader and its own schema, where it is installed."""
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed (pip install skypilot)")
    mounts = ["/sets=/etc/hostname"]  # looking at a bucket takes a cloud's credentials
    task(
        "method.beta=0.3",
        nodes=2,
        accelerators="H100:8",
        cloud="aws",
        spot=True,
        disk_size=200,
        mounts=mounts,
    )
    found = sky.Task.from_yaml(str(folder / "task.yaml"))
    assert found.num_nodes == 2
    (resources,) = found.resources
    assert resources.accelerators == {"H100": 8}
    assert resources.use_spot
    assert "prefopt train" in found.run
    task(nodes=2, volumes=["/runs=mine"])
    assert sky.Task.from_yaml(str(folder / "task.yaml")).volumes == {"/runs": "mine"}


def test_skypilot_knows_what_is_said_of_buckets(task: Task) -> None:
    """By its schema: to make the objects themselves takes a cloud's credentials."""
    why = "SkyPilot is not installed (pip install skypilot)"
    schemas = pytest.importorskip("sky.utils.schemas", reason=why)
    common_utils = pytest.importorskip("sky.utils.common_utils", reason=why)
    found = task(mounts=["/runs=s3://mine", "/data=gs://rows"])["file_mounts"]
    for place in ("/runs", "/data"):
        common_utils.validate_schema(found[place], schemas.get_storage_schema(), "")


@pytest.mark.parametrize("written", ["~/my runs/one", "~"])
def test_the_home_folder_is_that_of_the_machine(task: Task, folder: Path, written: str) -> None:
    there = folder / "home" / written.removeprefix("~").removeprefix("/")
    there.mkdir(parents=True)
    found = task(f"output_dir='{written}'")
    assert "--resume" not in asked(found["run"], folder)
    (there / "manifest.json").write_text("{}")
    assert asked(found["run"], folder)[-1] == "--resume"


def test_a_persons_home_folder_is_left_to_the_machine_too() -> None:
    recipe = Recipe.model_construct(output_dir="~some.one/my runs")
    assert batch_script.run_manifest(recipe) == "~some.one/'my runs/manifest.json'"
