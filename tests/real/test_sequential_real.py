"""Stages on human preferences with a pretrained model: by shell script and by `prefopt chain`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt_cli.chain.loader import load_chain
from prefopt_cli.chain.plan import make_plan
from prefopt_cli.chain.run import run_plan
from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from tests.cli.conftest import environment
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.real

ROWS = 64
FEW_STEPS = [
    "dataset.max_length=512",
    "training.max_steps=4",
    "training.gradient_accumulation_steps=1",
    "training.gradient_checkpointing=false",
    "training.learning_rate=1.0e-3",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "training.use_cpu=true",
]


@pytest.fixture(scope="module")
def by_script(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that recipes/chain-hh.sh leaves, and what it prints."""
    runs = tmp_path_factory.mktemp("script") / "runs"
    variables = {
        **environment(),
        "MODEL": str(shared / "models" / "stories260K"),
        "DATA": str(shared / "data" / "hh_helpful_harmless.jsonl.gz"),
        "RUNS": str(runs),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["sh", str(REPOSITORY / "recipes" / "chain-hh.sh"), *FEW_STEPS, f"dataset.train.limit={ROWS}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=runs.parent, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return runs, done.stdout


def test_the_script_trains_both_stages_and_shows_what_was_kept(by_script: tuple[Path, str]) -> None:
    runs, told = by_script
    manifest = RunFolder(runs / "harmless").read_manifest()
    assert [each["dimension"] for each in manifest["method"]["previous_stages"]] == ["helpful"]
    table = json.loads((runs / "harmless" / "eval" / "retention" / "retention.json").read_text())
    # 5 % of all rows each, without those of more tokens than the model's context holds.
    assert {name: each["pairs"] for name, each in table["sets"].items()} == {"helpful": 141, "harmless": 167}
    assert [stage["name"] for stage in table["stages"]] == ["base", "helpful", "harmless"]
    assert "helpful" in told


def test_a_chain_trains_the_same_policies_as_the_script(
    by_script: tuple[Path, str], shared: Path, tmp_path: Path
) -> None:
    runs, _ = by_script
    file = tmp_path / "chain.yaml"
    data = str(shared / "data" / "hh_helpful_harmless.jsonl.gz")
    text = (REPOSITORY / "recipes" / "chain-hh.yaml").read_text()
    file.write_text(text.replace("data/hh_helpful_harmless.jsonl.gz", data))
    settings = [f"model.name_or_path={shared / 'models' / 'stories260K'}", f"output_dir={tmp_path / 'out'}"]
    rate = [each.replace("training.", "stages.1.training.") for each in FEW_STEPS if "learning_rate" in each]
    rows = [f"stages.{number}.dataset.train.0.limit={ROWS}" for number in (0, 1)]
    chain, finder = load_chain(file, [*settings, *FEW_STEPS, *rate, *rows]), RunFinder()
    outcome = run_plan(
        make_plan(chain, reporter=Silent(), runs=finder), reporter=Silent(), runs=finder, told=lambda *_: None
    )
    assert outcome.status == "finished"
    for name in ("helpful", "harmless"):
        theirs, ours = (
            load_file(each / name / "model" / "model.safetensors") for each in (runs, tmp_path / "out")
        )
        assert all(ours[key].equal(theirs[key]) for key in theirs), name


def test_the_table_is_what_plain_transformers_finds(by_script: tuple[Path, str], shared: Path) -> None:
    """All 308 held-out pairs, one response at a time."""
    runs, _ = by_script
    recipe = load_recipe(runs / "harmless" / "recipe.yaml", ["dataset.train.0.limit=1"])
    prepared = prepare(recipe, Silent())
    table = json.loads((runs / "harmless" / "eval" / "retention" / "retention.json").read_text())
    places = [shared / "models" / "stories260K", runs / "helpful" / "model", runs / "harmless" / "model"]
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in places]
    for name, rows in prepared.tokens.eval.items():
        deltas = np.array([[_delta(model, row) for model in models] for row in rows])
        for number, stage in ((1, "helpful"), (2, "harmless")):
            gained = deltas[:, number] - deltas[:, 0]
            found = next(each for each in table["stages"] if each["name"] == stage)["results"][name]
            assert found["margin"]["value"] == pytest.approx(gained.mean(), abs=1e-4)
            assert found["accuracy"]["value"] == pytest.approx((gained > 0).mean(), abs=1e-9)
            by_logp = found["logp_accuracy"]["value"]
            assert by_logp == pytest.approx((deltas[:, number] > 0).mean(), abs=1e-9)


def _delta(model: torch.nn.Module, row: dict[str, list]) -> float:
    """log p(chosen) - log p(rejected)."""
    sides = []
    for response in row["response_ids"]:
        tokens = torch.tensor([row["prompt_ids"] + response])
        with torch.no_grad():
            logits = model(tokens).logits[0, len(row["prompt_ids"]) - 1 : -1]
        sides.append(logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return float(sides[0] - sides[1])
