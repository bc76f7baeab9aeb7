"""Runs on the sandbox's names: what they leave behind says those names, and training goes on from them."""

from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from prefopt_cli.runs import metrics
from tests.training.conftest import LORA, Run

pytestmark = pytest.mark.slow

START = "model.name_or_path=sandbox:base"
DATA = (
    "dataset.train={source: sandbox:helpful, limit: 64}",
    "dataset.eval={helpful: {source: sandbox:helpful, split: 'test', limit: 16}}",
    "training.max_steps=2",
)


@pytest.mark.parametrize("adapter", ["adapter=none", LORA], ids=["full", "adapter"])
def test_a_run_and_one_that_goes_on_from_it(run: Run, sandbox: Any, adapter: str) -> None:
    first = run("first", START, adapter, *DATA).run
    lineage = first.read_manifest()["lineage"]
    assert lineage["policy"] == lineage["name"] == "sandbox:base"
    assert lineage["weights"] == str(sandbox.base)
    assert "sandbox:base" in lineage["reference"]
    assert str(sandbox.base) not in lineage["reference"]

    card = (first.model / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert not {"base_model", "datasets"} & set(front)
    assert "- Starting policy: sandbox:base\n" in card
    for row in ("| train | sandbox:helpful | 5000 | 64 |", "| helpful | sandbox:helpful/test | 1000 | 16 |"):
        assert row in card
    assert str(sandbox.folder) not in card
    AutoModelForCausalLM.from_pretrained(first.model)

    second = run(
        "second", f"model.name_or_path={first.path}", adapter, *DATA, "training.eval_on_start=true"
    ).run
    start = metrics.read(second.metrics)[0]
    assert start["eval_helpful_gpo/squared_log_ratio"] == pytest.approx(0.0, abs=1e-7)
    again = second.read_manifest()["lineage"]
    assert again["origin"] == "sandbox:base"
    assert [each["run_id"] for each in again["ancestors"]] == [first.read_manifest()["run_id"]]
    assert again["policy"].startswith(
        str(first.model) if adapter == "adapter=none" else "sandbox:base with the adapter"
    )
    assert str(sandbox.folder) not in (second.model / "README.md").read_text()
