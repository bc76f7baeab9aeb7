"""Quantised weights beyond one short run: two processes, a chain, a pretrained model on human preferences."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt_cli.runs import metrics
from tests.cli.conftest import (
    Prefopt,
    prefopt,  # noqa: F401  (the fixture)
)
from tests.slow.test_processes import train
from tests.training.conftest import LORA

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")

CHAIN = """\
model: {{name_or_path: {world}/model}}
adapter: {{type: lora, r: 4, lora_alpha: 8}}
quantization: {{bits: 4}}
dataset:
  train: {world}/pairs.jsonl
  eval: {{tone: {world}/heldout.jsonl, facts: {world}/heldout.jsonl}}
  max_length: 256
method: {{loss: logistic, beta: 0.1}}
training: {{per_device_train_batch_size: 4, max_steps: 3, save_steps: 3, learning_rate: 1.0e-2, use_cpu: true}}
stages:
  - {{dimension: tone}}
  - {{dimension: facts, lambdas: {{tone: 0.5}}}}
output_dir: {out}
"""

HH = """\
model: {{name_or_path: {shared}/models/stories260K}}
adapter: {{type: lora, r: 16, lora_alpha: 32}}
quantization: {{bits: {bits}}}
dataset:
  train: {{source: {shared}/data/hh_helpful_harmless.jsonl.gz, limit: 200}}
  max_length: 256
method: {{name: gpo, beta: 0.1}}
training: {{per_device_train_batch_size: 4, max_steps: 8, learning_rate: 3.0e-4, logging_steps: 1, use_cpu: true}}
output_dir: {out}
"""


@pytest.mark.parametrize("bits", [4, 8])
def test_two_processes_train_what_one_does(tiny_world: Path, tmp_path: Path, bits: int) -> None:
    options = (LORA.replace("0.1}", "0.0}"), f"quantization.bits={bits}", "training.max_steps=3")
    one, two = (train(tiny_world, tmp_path, processes, *options) for processes in (1, 2))
    losses = [
        [each["loss"] for each in metrics.read(run / "metrics.jsonl") if "loss" in each] for run in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # gradients are summed in bfloat16
    adapters = [load_file(run / "model" / "adapter_model.safetensors") for run in (one, two)]
    for name, value in adapters[0].items():
        assert value.dtype == adapters[1][name].dtype == torch.bfloat16


def test_a_chain_on_quantised_weights(prefopt: Prefopt, tiny_world: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every stage and the retention table load the base as it was trained on; done again, nothing is trained."""
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN.format(world=tiny_world, out=tmp_path / "chain"))
    result = prefopt("chain", str(file))
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "chain" / "facts" / "manifest.json").read_text())
    assert facts["lineage"]["quantization"]["bits"] == 4
    again = prefopt("chain", str(file), "--dry-run", "--json")
    assert again.code == 0, again.err
    assert [step["action"] for step in json.loads(again.out)["stages"]] == ["skip", "skip"]


@pytest.mark.real
@pytest.mark.parametrize("bits", [4, 8])
def test_a_pretrained_model_is_merged(prefopt: Prefopt, shared: Path, tmp_path: Path, bits: int) -> None:  # noqa: F811
    """The figures of docs/quantization.md, in small: dequantised the same policy, original another."""
    recipe = tmp_path / "hh.yaml"
    recipe.write_text(HH.format(shared=shared, bits=bits, out=tmp_path / "hh"))
    result = prefopt("train", str(recipe))
    assert result.code == 0, result.err
    found = {}
    for base in ("dequantized", "original"):
        result = prefopt("merge", str(tmp_path / "hh"), str(tmp_path / base), "--base", base, "--json")
        assert result.code == 0, result.err
        found[base] = json.loads(result.out)["difference"]["mean_per_token"]
    assert found["dequantized"] < 1e-5
    assert (0.01 if bits == 4 else 0.001) < found["original"] < (1.0 if bits == 4 else 0.05)
