"""A run from recipe to folder: what it leaves behind, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_cli.errors import UserError
from prefopt_cli.models.loading import load_model
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import CHECKPOINT_MARK, RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.guard import NotFiniteError
from prefopt_cli.training.objectives import find_objective
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import build_trainer
from tests.training.conftest import LORA, Run

PICKLES = {".bin", ".pt", ".pth", ".pkl"}


def test_full_run_leaves_a_complete_folder(run: Run, tiny_world: Path) -> None:
    outcome = run("run")
    folder = outcome.run
    assert (outcome.status, outcome.step, outcome.total_steps) == ("finished", 6, 6)

    manifest = folder.read_manifest()
    assert manifest["status"] == "finished"
    assert manifest["lineage"]["reference"].endswith("as it is at the start")
    assert manifest["receipt"]["sets"]["train"]["rows"] == 96
    assert set(manifest["data"]) == {"train", "heldout"}
    assert manifest["versions"]["trl"].startswith("1.")

    steps = [record["step"] for record in metrics.read(folder.metrics) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    logged = metrics.read(folder.metrics)[0]
    for name in (
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "gpo/gradient_weight",
        "gpo/squared_log_ratio",
    ):
        assert name in logged
    assert [
        (path.name, (path / CHECKPOINT_MARK).is_file()) for path in sorted(folder.checkpoints.glob("c*"))
    ] == [
        ("checkpoint-3", True),
        ("checkpoint-6", True),
    ]

    before = AutoModelForCausalLM.from_pretrained(tiny_world / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder.model).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoTokenizer.from_pretrained(folder.model)
    assert not [file for file in folder.model.iterdir() if file.suffix in PICKLES]
    card = (folder.model / "README.md").read_text()
    for expected in (
        "tang2024generalized",
        "loss: logistic",
        "| train | pairs.jsonl | 96 | 96 | none |",
        manifest["versions"]["trl"],
    ):
        assert expected in card


def test_first_step_is_that_of_a_policy_equal_to_its_reference(run: Run) -> None:
    first = metrics.read(run("run", "training.max_steps=1").run.metrics)[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["rewards/margins"] == 0.0
    assert first["gpo/gradient_weight"] == pytest.approx(0.5)
    assert first["gpo/squared_log_ratio"] == 0.0


def test_training_widens_the_margin(run: Run) -> None:
    logged = metrics.read(run("run", "training.max_steps=20").run.metrics)
    assert logged[19]["rewards/margins"] > logged[1]["rewards/margins"] + 0.5
    assert logged[19]["gpo/squared_log_ratio"] > 1


def test_adapter_loads_with_plain_peft(run: Run, tiny_world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tiny_world.parent)  # a relative base must not tie the adapter to this folder
    outcome = run("run", LORA, f"model.name_or_path={tiny_world.name}/model")
    monkeypatch.chdir(tmp_path)
    assert not list(outcome.run.model.rglob("ref"))
    saved = json.loads((outcome.run.model / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(saved["base_model_name_or_path"])
    ids = torch.arange(5, 20)[None]
    before = base(input_ids=ids).logits
    policy = PeftModel.from_pretrained(base, outcome.run.model)
    assert not torch.equal(policy(input_ids=ids).logits, before)


def test_adapter_dropout_is_applied_to_the_policy_alone(run: Run, make_recipe) -> None:
    without, with_dropout = (
        run(f"run{p}", f"adapter={{type: lora, r: 4, lora_dropout: {p}}}", "training.max_steps=3")
        for p in (0.0, 0.5)
    )
    first, second = (
        load_file(next(each.run.model.glob("*.safetensors"))) for each in (without, with_dropout)
    )
    assert any(not first[name].equal(second[name]) for name in first)

    # The reference that stands beside the policy in one model is the same at every call.
    recipe = make_recipe("later", "adapter={type: lora}", f"model.name_or_path={with_dropout.run.path}")
    recipe = recipe.model_copy(update={"training": {**recipe.training, "disable_dropout": False}})
    prepared = prepare(recipe, Silent())
    trainer = build_trainer(
        recipe,
        prepared,
        load_model(prepared.source, recipe.model, recipe.adapter),
        training_arguments(recipe, with_dropout.run, evaluates=True),
        find_objective(recipe.method, with_dropout.run.path),
        "",
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    calls = [trainer.compute_ref_log_probs(trainer.model, batch)[0] for _ in range(2)]
    policies = [trainer.score_pairs(trainer.model, batch)[0].logps for _ in range(2)]
    assert calls[0].equal(calls[1])
    assert not policies[0].equal(policies[1])
    assert trainer.model.training


def test_own_function_beside_the_recipe(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text("def steep(z):\n    return (1 - z).clamp(min=0) ** 3\n")
    outcome = run("run", "method.loss=my_losses:steep", "training.max_steps=1")
    assert metrics.read(outcome.run.metrics)[0]["loss"] == pytest.approx(1.0)
    assert outcome.run.read_manifest()["method"]["f"]["slope_at_zero"] == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("source", "loss", "complaint"),
    [
        ("def f(z):\n    return z\n", "own_a:f", "must be negative"),
        ("def f(z):\n    return -z\n", "own_b:g", "no function 'g'"),
        ("1 / 0\n", "own_c:f", "ZeroDivisionError"),
        ("f = 3\n", "own_d:f", "not a function"),
        ("", "nowhere:f", "no module 'nowhere'"),
    ],
)
def test_unusable_function_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, source: str, loss: str, complaint: str
) -> None:
    (tmp_path / f"{loss.split(':')[0]}.py").write_text(source) if source else None
    with pytest.raises(UserError, match=complaint):
        run("run", f"method.loss={loss}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_evaluation_is_exact_over_uneven_batches(run: Run, batch: int) -> None:
    outcome = run(
        f"run{batch}",
        f"training.per_device_eval_batch_size={batch}",
        "training.max_steps=4",
        "training.seed=1",
    )
    figures = {key: value for key, value in outcome.metrics.items() if key.startswith("eval_heldout_")}
    # The same numbers for every batch size; written down by the run with batch 24, which has no remainder.
    wide = run(
        f"wide{batch}", "training.per_device_eval_batch_size=24", "training.max_steps=4", "training.seed=1"
    )
    for key in figures:
        if key.rsplit("_", 1)[-1] not in {"runtime", "second"}:
            assert figures[key] == pytest.approx(wide.metrics[key], rel=1e-5, abs=1e-6), key


def test_training_figures_are_exact_over_uneven_batches(run: Run) -> None:
    """96 pairs at batch 36 make batches of 36, 36, 24; one log over the epoch is the mean over pairs."""
    options = (
        "training.learning_rate=0",
        "training.num_train_epochs=1",
        "training.max_steps=-1",
        "training.save_strategy=no",
    )
    uneven = run("uneven", *options, "training.per_device_train_batch_size=36", "training.logging_steps=3")
    even = run("even", *options, "training.per_device_train_batch_size=96", "training.logging_steps=1")
    for name in ("entropy", "logps/chosen", "logits/chosen", "mean_token_accuracy", "num_tokens"):
        assert uneven.metrics[name] == pytest.approx(even.metrics[name], rel=1e-5), name


def test_not_finite_stops_with_step_and_pairs_and_keeps_the_checkpoint(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError) as caught:
        run("run", "training.learning_rate=1.0e+30", "training.save_steps=1", "training.max_grad_norm=0")
    message = str(caught.value)
    assert "step 2" in message
    assert message.count("pairs.jsonl:") == 4
    folder = tmp_path / "run"
    assert (folder / "checkpoints" / "checkpoint-1" / CHECKPOINT_MARK).is_file()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "not finite" in manifest["error"]
    assert not (folder / "model").exists()


STEEP = """
import torch

class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (1 - z).abs()

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        return torch.where(z.abs() > 20, torch.inf, -gradient)

f = Steep.apply
"""


def test_a_gradient_that_is_not_finite_stops_too(run: Run, tmp_path: Path) -> None:
    """The loss itself stays finite; only the slope at |z| > 20, where the probe does not look, is infinite."""
    (tmp_path / "own_steep.py").write_text(STEEP)
    with pytest.raises(NotFiniteError, match="the gradient is not finite") as caught:
        run("run", "method.loss=own_steep:f", "method.beta=100", "training.save_steps=1")
    assert str(caught.value).count("pairs.jsonl:") == 4
    last = RunFolder(tmp_path / "run").last_checkpoint()
    assert last is not None
    assert all(weight.isfinite().all() for weight in load_file(last / "model.safetensors").values())


def test_existing_folders_are_never_overwritten_unasked(run: Run, tmp_path: Path) -> None:
    first = run("run", "training.max_steps=1")
    stamp = first.run.read_manifest()["run_id"]
    with pytest.raises(UserError, match="--overwrite"):
        run("run", "training.max_steps=1")
    assert first.run.read_manifest()["run_id"] == stamp
    second = run("run", "training.max_steps=1", overwrite=True)
    assert second.run.read_manifest()["run_id"] != stamp

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        run("thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_file_in_the_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run("run")


def test_rows_longer_than_the_models_context_are_refused(run: Run, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a b c d " * 200, "chosen": " yes", "rejected": " no"}) + "\n")
    with pytest.raises(UserError, match=r"context holds 256.*max_length: 256"):
        run("run", f"dataset.train={long}", "dataset.max_length=null")
    assert not (tmp_path / "run").exists()


def test_checkpoints_beyond_the_limit_are_removed(run: Run) -> None:
    outcome = run("run", "training.save_steps=1", "training.save_total_limit=2")
    assert sorted(path.name for path in outcome.run.checkpoints.glob("c*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]


def test_unknown_hub_model_while_offline(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nobody/nothing.*offline"):
        run("run", "model.name_or_path=nobody/nothing")
    assert not (tmp_path / "run").exists()
