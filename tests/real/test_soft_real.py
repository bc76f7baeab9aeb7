"""Soft Preference Optimization on human data with a pretrained model: pairs, ranked lists, its own samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from prefopt_cli import data
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import SoftSettings
from prefopt_cli.runs import metrics
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import Outcome, train
from prefopt_cli.training.soft import SoftTrainer
from tests.real.test_parity import STEPS, arguments, history, text_rows, tokens  # noqa: F401 - a fixture

pytestmark = pytest.mark.real

RECIPE = """\
model: {{name_or_path: {shared}/models/stories260K}}
dataset:
  train: {{source: {shared}/data/{file}, limit: 64}}
  holdout: 0.2
  max_length: 400
method:
  name: soft
  alpha: 0.1
  kl_coef: 0.1
  regularizer: {{sample_every: 4, num_prompts: 4, max_new_tokens: 32}}
training:
  per_device_train_batch_size: 4
  max_steps: 8
  learning_rate: 5.0e-4
  logging_steps: 1
  gradient_checkpointing: false
  use_cpu: true
output_dir: {out}
"""


@pytest.fixture
def trained(shared: Path, tmp_path: Path) -> Any:
    def run(file: str, *overrides: str) -> Outcome:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(shared=shared, file=file, out=tmp_path / "run"))
        return train(load_recipe(path, overrides), recipe_folder=tmp_path, reporter=Silent())

    return run


class WithoutReference(DPOTrainer):
    """TRL's sigmoid loss where the reference gives every response the log-probability 0."""

    def use_zeros(self) -> None:
        zeros = [0.0] * len(self.train_dataset)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            self.train_dataset = self.train_dataset.add_column(name, zeros)
        self.precompute_ref_logps = True


@pytest.mark.parametrize("layout", [None, Layout()], ids=["packed", "padded"])
def test_every_step_on_pairs_equals_trls_without_a_reference(
    shared: Path,
    tokens: data.TokenizedData,  # noqa: F811
    tmp_path: Path,
    layout: Layout | None,
) -> None:
    """At alpha = beta = 1 both are -log sigma(Delta); 20 whole steps."""
    folder = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = WithoutReference(
        model=str(folder),
        args=arguments(tmp_path / "trl", max_length=512, beta=1.0),
        train_dataset=text_rows(shared, tokens),
        processing_class=tokenizer,
    )
    theirs.use_zeros()
    ours = SoftTrainer(
        settings=SoftSettings(name="soft", alpha=1.0, kl_coef=0.0),
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=None,
        args=arguments(tmp_path / "prefopt", remove_unused_columns=False, max_length=None),
        train_dataset=tokens.train,
        eval_dataset={},
        processing_class=tokenizer,
        layout=layout,
    )
    expected, got = history(theirs, "loss"), history(ours, "loss")
    assert len(got) == STEPS
    # Losses of tens of nats here, where those of DPO begin at log 2.
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert max(got) - min(got) > 1.0
    for name in ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "entropy"):
        pairs = [
            [record[name] for record in each.state.log_history if name in record] for each in (ours, theirs)
        ]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("file", ["qa_feedback_ranked.jsonl.gz", "pandalm_ranked.jsonl.gz"])
def test_ranked_human_lists_train_as_they_are(trained: Any, file: str) -> None:
    outcome = trained(file)
    records = [record for record in metrics.read(outcome.run.metrics) if "loss" in record]
    assert len(records) == 8
    assert records[0]["kl/ref"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["kl/ref"] > 0
    evaluated = [record for record in metrics.read(outcome.run.metrics) if "eval_holdout_loss" in record]
    assert evaluated
    receipt = outcome.run.read_manifest()["receipt"]["sets"]["train"]
    assert receipt["responses"] > 2 * receipt["rows"]


def test_the_policy_writes_its_own_stories(trained: Any, shared: Path) -> None:
    """Samples of a pretrained model are words, not noise: it finds them likelier than their words in disorder."""
    outcome = trained("hh_helpful_harmless.jsonl.gz", "training.learning_rate=0", "training.max_steps=5")
    kept = metrics.read(outcome.run.samples)
    assert [record["step"] for record in kept] == [1, 1, 1, 5, 5, 5]
    lines = (outcome.run.path / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"].endswith("Assistant:") for line in lines)
    records = [record for record in metrics.read(outcome.run.metrics) if "kl/ref" in record]
    # Nothing was learnt, so the policy is its reference; a story-teller is far from certain of its next word.
    assert all(record["kl/ref"] == pytest.approx(0, abs=1e-4) for record in records)
    assert all(0.5 < record["entropy/sampled"] / record["sample/length"] < 4 for record in records)
