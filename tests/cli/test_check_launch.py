"""`prefopt check` of a recipe whose launch is in a file: what `prefopt train` would make of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Prefopt
from tests.launch.test_resolving import FSDP
from tests.training.conftest import LORA

QUICK = ("--pairs", "0")


@pytest.fixture
def fsdp(tmp_path: Path) -> str:
    path = tmp_path / "fsdp.yaml"
    path.write_text(FSDP)
    return f"launch.config={path}"


def zero(folder: Path, content: Any) -> tuple[str, str]:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"launch.config={path}", "launch.engine=deepspeed"


def test_the_estimate_is_of_what_the_file_asks_for(prefopt: Prefopt, recipe: Path, fsdp: str) -> None:
    shown = prefopt("check", str(recipe), fsdp, *QUICK)
    assert shown.code == 0, shown.err
    assert "fsdp on 2 processes, weights whole from forward to backward" in shown.out
    assert "Steps: 6 of 4 pairs per process, 8 on 2." in shown.out
    asks = "mixed_precision: bf16, fsdp_activation_checkpointing: true"
    assert f"Note: launch.config asks for {asks}, which the estimate leaves out." in shown.out
    found = json.loads(prefopt("check", str(recipe), fsdp, "launch.processes=4", *QUICK, "--json").out)
    assert found["processes"] == 4
    assert "gathered weights" in found["memory"]["parts"]


def test_a_budget_is_met_on_top_of_the_file(prefopt: Prefopt, recipe: Path, fsdp: str) -> None:
    shown = prefopt(
        "check", str(recipe), fsdp, "training.use_cpu=false", "--memory", "8GiB", *QUICK, "--json"
    )
    assert shown.code == 0, shown.err
    fit = json.loads(shown.out)["fit"]
    assert (fit["gpus"], fit["as_it_is"]) == (2, True)


def test_what_train_would_refuse(prefopt: Prefopt, recipe: Path, fsdp: str, tmp_path: Path) -> None:
    broken = zero(tmp_path, '{\n"zero_optimization": {"stage": 3},}')
    for asked, words in (
        (("launch.config=nope.yaml",), "launch.config: there is no file nope.yaml."),
        (("launch.engine=fsdp",), "fsdp shards a model over several processes, and there is one."),
        ((fsdp, "launch.processes=1"), "fsdp shards a model over several processes, and there is one."),
        ((fsdp, "launch.engine=ddp"), "launch.engine: ddp, but "),
        (broken, "ds.json:2: this is no JSON: "),
    ):
        for command in (("check",), ("train",), ("launch", "print")):
            result = prefopt(*command, str(recipe), *asked)
            assert (result.code, words in result.err) == (2, True), (command, asked, result)


def test_under_a_launcher_processes_are_there_already(
    prefopt: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # For another device, so that no process is waited for.
    shown = prefopt("check", str(recipe), "launch.engine=fsdp", "--device", "cuda", *QUICK)
    assert shown.code == 0, shown.err
    assert "fsdp on 2 processes" in shown.out


@pytest.mark.parametrize("by", ["deepspeed", "fsdp"])
def test_weights_of_few_bits_are_not_taken_apart(
    by: str, prefopt: Prefopt, recipe: Path, fsdp: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    asked = (fsdp,) if by == "fsdp" else zero(tmp_path, {"zero_optimization": {"stage": 3}})
    result = prefopt("check", str(recipe), *asked, LORA, "quantization={bits: 4}", *QUICK)
    assert result.code == 2
    assert "takes weights apart, which those of" in result.err
    whole = zero(tmp_path, {"zero_optimization": {"stage": 2}})
    assert prefopt("check", str(recipe), *whole, LORA, "quantization={bits: 4}", *QUICK).code == 0
