"""`prefopt lineage`: what a policy went through, and what of it is still there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt_cli.evaluation.merge_check import MergeSettings, merge_run
from prefopt_cli.training.reporting import Silent
from tests.cli.conftest import Prefopt, environment
from tests.training.conftest import (
    LORA,
    Run,
    make_recipe,  # noqa: F401  (a fixture, as is the next)
    run,  # noqa: F401
)

SHORT = "training.max_steps=2"


@pytest.fixture
def chain(run: Run, tmp_path: Path) -> Path:  # noqa: F811
    """The last of three runs: gpo with an adapter, sequential with it, sequential with all weights."""
    run("kind", LORA, SHORT)
    run("calm", LORA, SHORT, f"model.name_or_path={tmp_path}/kind", sequential(tmp_path, "kind"))
    run(
        "brief",
        SHORT,
        f"model.name_or_path={tmp_path}/calm",
        sequential(tmp_path, "kind", "calm"),
        "method.beta=0.3",
    )
    return tmp_path / "brief"


def sequential(folder: Path, *previous: str) -> str:
    lambdas = ", ".join(f"{name}: 0.{number}" for number, name in enumerate(previous, 5))
    listed = ", ".join(str(folder / name) for name in previous)
    return f"method={{name: sequential, previous: [{listed}], lambdas: {{{lambdas}}}}}"


def states(prefopt: Prefopt, *arguments: str) -> list[str]:
    """Of every stage."""
    result = prefopt("lineage", *arguments, "--json")
    assert result.code == 0, result.err
    return [step["state"] for step in json.loads(result.out)["steps"]]


def test_three_stages(prefopt: Prefopt, chain: Path, tiny_world: Path) -> None:
    result = prefopt("lineage", str(chain))
    assert result.code == 0, result.err
    assert result.err == ""
    manifest = json.loads((chain / "manifest.json").read_text())
    first = manifest["lineage"]["ancestors"][0]
    shown = [line.strip("│└─ ") for line in result.out.splitlines()]
    folder = chain.parent
    assert shown[0] == f"base: {tiny_world}/model (there)"
    assert shown[1:6] == [
        "1 kind (there)",
        "method:    gpo, logistic, beta 0.1",
        f"trained:   adapter {folder}/kind/model",
        f"data:      train {first['data']['train'][:12]}",
        f"run:       {folder}/kind (id {first['run_id'][:12]})",
    ]
    assert shown[6:9] == [
        "2 calm (there)",
        "method:    sequential, logistic, beta 0.1, lambda kind 0.5",
        f"trained:   adapter {folder}/calm/model",
    ]
    assert shown[11:14] == [
        "3 brief (finished)",
        "method:    sequential, logistic, beta 0.3, lambda kind 0.5, lambda calm 0.6",
        "trained:   all weights",
    ]
    assert shown[14] == f"reference: {manifest['lineage']['reference']}"
    depths = [line.index(name) for line, name in zip(result.out.splitlines()[1::5], "123", strict=False)]
    assert depths == [3, 6, 9]

    told = json.loads(prefopt("lineage", str(chain), "--json").out)
    assert told["adapters"] == [f"{folder}/kind/model", f"{folder}/calm/model"]
    assert told["steps"][0]["data"] == first["data"]
    assert told["steps"][2]["method"]["beta"] == 0.3


def test_moved_replaced_and_changed_runs(prefopt: Prefopt, chain: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (tmp_path / "kind").rename(away / "kind")
    assert states(prefopt, str(chain)) == ["gone", "there", "finished"]
    assert states(prefopt, str(chain), "--runs-dir", str(away))[0] == f"moved to {away}/kind"
    assert states(prefopt, str(chain), "--runs-dir", str(chain))[0].startswith("gone; not found")
    shutil.copytree(tmp_path / "calm", tmp_path / "kind")
    assert states(prefopt, str(chain))[0] == "another run lies there now"
    weights = away / "kind" / "model" / "adapter_model.safetensors"
    save_file({name: torch.ones_like(value) for name, value in load_file(weights).items()}, weights)
    assert states(prefopt, str(chain), "--runs-dir", str(away))[0] == f"moved to {away}/kind, but changed"
    shutil.rmtree(tmp_path / "kind")
    (away / "kind").rename(tmp_path / "kind")
    assert states(prefopt, str(chain))[0] == "there, but changed"


def test_a_merged_model(prefopt: Prefopt, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The folder has the whole line, and so has a run that starts from it; also from another working directory."""
    monkeypatch.chdir(tmp_path)
    run("kind", LORA, SHORT)
    merge_run("kind", tmp_path / "merged", MergeSettings(), Silent())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = prefopt("lineage", str(tmp_path / "merged"))
    assert "1 kind (there)" in result.out
    assert result.out.splitlines()[-1].strip() == f"└─ merged: {tmp_path}/merged"
    run("brief", SHORT, f"model.name_or_path={tmp_path}/merged")
    told = json.loads(prefopt("lineage", str(tmp_path / "brief"), "--json").out)
    assert [(step["dimension"], step["state"]) for step in told["steps"]] == [
        ("kind", "there"),
        ("brief", "finished"),
    ]
    assert told["adapters"] == [str(tmp_path / "kind" / "model")]
    assert told["base_state"] == "there"


def test_a_base_that_is_gone_or_changed(prefopt: Prefopt, run: Run, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    own = shutil.copytree(tiny_world / "model", tmp_path / "own")
    run("kind", SHORT, f"model.name_or_path={own}")

    def base() -> Any:
        return json.loads(prefopt("lineage", str(tmp_path / "kind"), "--json").out)["base_state"]

    assert base() == "there"
    weights = own / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    assert base() == "there, but changed"
    shutil.rmtree(own)
    assert base() == "gone"


def test_an_unfinished_run(prefopt: Prefopt, run: Run, tmp_path: Path) -> None:  # noqa: F811
    run("kind", LORA, SHORT)
    manifest = tmp_path / "kind" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "interrupted"}))
    shutil.rmtree(tmp_path / "kind" / "model")
    result = prefopt("lineage", str(tmp_path / "kind"))
    assert result.code == 0, result.err
    assert "1 kind (interrupted)" in result.out
    assert f"trained:   adapter {tmp_path}/kind/model" in result.out


def test_what_is_no_run(prefopt: Prefopt, tiny_world: Path, tmp_path: Path) -> None:
    for place, told in (
        (tiny_world / "model", "is a model folder, but no run"),
        (tiny_world, "is no run folder"),
        (tmp_path / "gone", "there is no run in"),
    ):
        result = prefopt("lineage", str(place))
        assert result.code == 2
        assert told in result.err
    result = prefopt("lineage", str(tmp_path), "--runs-dir", str(tmp_path / "gone"))
    assert result.code == 2
    assert "--runs-dir: there is no folder" in result.err


def test_nothing_heavy_is_imported(run: Run, tmp_path: Path) -> None:  # noqa: F811
    run("kind", LORA, SHORT)
    program = (
        "import sys\n"
        "from prefopt_cli.cli.lineage import lineage\n"
        f"lineage({str(tmp_path / 'kind')!r})\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stderr.strip() == "[]"
    assert "1 kind (finished)" in done.stdout
