"""The reference's log-probabilities: computed once, read afterwards, and the same as a pass in every step."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from prefopt_cli.errors import UserError
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.frozen_policies import numerics, precision
from prefopt_cli.training.reporting import Silent
from tests.training.conftest import LORA, MakeRecipe, Run

PASS_IN_EVERY_STEP = "training.precompute_ref_log_probs=false"
FROZEN = "adapter={type: lora, r: 4, lora_alpha: 8}"


class Listener(Silent):
    """Keeps what is said, and may interrupt the scoring."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.messages: list[str] = []
        self.scored: list[int] = []
        self._stop_after = stop_after

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, task: str, done: int, total: int) -> None:
        if task.startswith("scoring with the reference"):
            self.scored.append(done)
            if self._stop_after is not None and len(self.scored) == self._stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    def said(self, start: str) -> str:
        return next(text for text in self.messages if text.startswith(start))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


def losses(outcome: Any) -> list[float]:
    return [record["loss"] for record in metrics.read(outcome.run.metrics) if "loss" in record]


@pytest.mark.parametrize("adapter", ["adapter=none", FROZEN], ids=["full", "adapter"])
def test_cached_scores_give_the_losses_of_a_pass_in_every_step(run: Run, adapter: str) -> None:
    cached, stepwise = run("cached", adapter), run("stepwise", adapter, PASS_IN_EVERY_STEP)
    assert losses(cached) == pytest.approx(losses(stepwise), rel=1e-5)
    assert losses(cached)[-1] != pytest.approx(losses(cached)[0], rel=1e-3)
    name = "eval_heldout_rewards/margins"
    assert cached.metrics[name] == pytest.approx(stepwise.metrics[name], rel=1e-4)


@pytest.mark.parametrize("second", ["adapter=none", LORA], ids=["merged", "continued"])
def test_the_reference_of_a_later_run_is_the_earlier_policy_both_ways(run: Run, second: str) -> None:
    earlier = run("earlier", LORA)
    start = (second, f"model.name_or_path={earlier.run.path}", "training.eval_on_start=true")
    cached, stepwise = run("cached", *start), run("stepwise", *start, PASS_IN_EVERY_STEP)
    assert losses(cached) == pytest.approx(losses(stepwise), rel=1e-4)


def test_a_second_run_on_the_same_data_scores_nothing(run: Run) -> None:
    first, second = Listener(), Listener()
    one = run("one", reporter=first)
    two = run(
        "two", "method.loss=hinge", "method.beta=1.0", LORA, "dataset.train.0.limit=50", reporter=second
    )
    responses = 2 * (96 + 24)
    assert f"{responses} responses, {responses} computed in" in first.said("Reference log-probabilities")
    assert first.scored[-1] == responses
    assert second.said("Reference log-probabilities").endswith("all from the cache.")
    assert not second.scored
    assert one.run.read_manifest()["reference_scores"] == {"responses": responses, "computed": responses}
    assert two.run.read_manifest()["reference_scores"] == {"responses": 2 * (50 + 24), "computed": 0}


def test_scoring_that_is_interrupted_goes_on_where_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt_cli.scoring.frozen.BATCH_TOKENS", {"cpu": 512})
    stopped = Listener(stop_after=3)
    interrupted = run("run", reporter=stopped)
    assert (interrupted.status, interrupted.step, interrupted.signal) == ("interrupted", 0, signal.SIGTERM)
    assert interrupted.run.read_manifest()["status"] == "interrupted"
    resumed = Listener()
    outcome = run("run", reporter=resumed, resume=True)
    assert outcome.status == "finished"
    kept = stopped.scored[-1]
    assert 0 < kept < 240
    assert f"{kept} from the cache, {240 - kept} computed" in resumed.said("Reference log-probabilities")
    assert losses(outcome) == pytest.approx(losses(run("plain", PASS_IN_EVERY_STEP)), rel=1e-5)


def test_scores_are_of_the_precision_that_accelerate_asks_for(
    run: Run, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its configuration says so in the environment; scores of another precision are other scores."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = training_arguments(make_recipe("half"), RunFolder(tmp_path / "half"), evaluates=False)
    assert numerics(args)["autocast"] == "bf16"
    with precision(args)():
        assert torch.is_autocast_enabled("cpu")
    first = run("half", "training.max_steps=1").run
    (record,) = (each for each in metrics.read(first.metrics) if "loss" in each)
    assert record["rewards/margins"] == 0
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    whole = run("whole", "training.max_steps=1").run
    assert whole.read_manifest()["reference_scores"]["computed"] > 0, "not those of half precision"


def test_no_second_model_is_in_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt_cli.training import run as module

    trainers = []
    build = module.build_trainer

    def keep(*arguments: Any, **options: Any) -> Any:
        trainers.append(build(*arguments, **options))
        return trainers[-1]

    monkeypatch.setattr(module, "build_trainer", keep)
    run("cached")
    run("stepwise", PASS_IN_EVERY_STEP)
    assert [trainer.ref_model is None for trainer in trainers] == [True, False]


def test_eval_sets_are_not_scored_where_nothing_evaluates(run: Run) -> None:
    listener = Listener()
    run("run", 'training.eval_strategy="no"', reporter=listener)
    assert "192 responses, 192 computed" in listener.said("Reference log-probabilities")


def test_noise_that_depends_on_the_row_rules_packing_out(run: Run) -> None:
    listener = Listener()
    run("run", "training.neftune_noise_alpha=5.0", "training.max_steps=1", reporter=listener)
    assert "padded rows, because training.neftune_noise_alpha" in listener.said("Layout")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_layout_changes_no_figure(run: Run, layout: str) -> None:
    listener = Listener()
    outcome = run(layout, f"training.attention_layout={layout}", reporter=listener)
    assert listener.said(f"Layout: {layout}")
    assert losses(outcome) == pytest.approx(losses(run("auto")), rel=1e-5)


@pytest.fixture
def short_sighted(tiny_world: Path, tmp_path: Path) -> Path:
    """A model that sees 16 tokens back."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    config = MistralConfig(
        vocab_size=AutoModelForCausalLM.from_pretrained(tiny_world / "model").config.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
        eos_token_id=tokenizer.eos_token_id,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "short-sighted")
    tokenizer.save_pretrained(tmp_path / "short-sighted")
    return tmp_path / "short-sighted"


def test_a_model_that_cannot_be_packed_is_padded_and_says_why(run: Run, short_sighted: Path) -> None:
    listener = Listener()
    outcome = run("run", f"model.name_or_path={short_sighted}", reporter=listener)
    assert outcome.status == "finished"
    assert "padded rows, because the model sees 16 tokens back" in listener.said("Layout")


def test_insisting_on_packing_is_refused_before_anything_is_written(
    run: Run, make_recipe: MakeRecipe, short_sighted: Path
) -> None:
    overrides = (f"model.name_or_path={short_sighted}", "training.attention_layout=packed")
    with pytest.raises(UserError, match=r"attention_layout: packed is not possible.*16 tokens back"):
        run("run", *overrides)
    assert not Path(make_recipe("run", *overrides).output_dir).exists()
