"""The few things of TRL's and transformers' insides that prefopt leans on. When one of these fails after an
upgrade, `training/trainer.py`, `scoring/head.py` or `scoring/forward.py` must follow."""

import inspect

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.batches import ComparisonCollator, example_of
from prefopt_cli.training.trainer import PreferenceTrainer


def test_prepare_dataset_is_where_trl_tokenises() -> None:
    assert list(inspect.signature(DPOTrainer._prepare_dataset).parameters) == [
        "self",
        "dataset",
        "processing_class",
        "args",
        "dataset_name",
    ]
    assert "tokenize" in inspect.getsource(DPOTrainer._prepare_dataset)
    assert "self._prepare_dataset(" in inspect.getsource(DPOTrainer.__init__)


def test_overridden_methods_exist_with_their_arguments() -> None:
    for name, wanted in {
        "compute_loss": {"model", "inputs", "return_outputs", "num_items_in_batch"},
        "compute_ref_log_probs": {"model", "inputs"},
        "evaluate": {"eval_dataset", "ignore_keys", "metric_key_prefix"},
        "log": {"logs", "start_time"},
        "create_model_card": set(),
    }.items():
        assert wanted <= set(inspect.signature(getattr(DPOTrainer, name)).parameters), name


def test_trl_keeps_a_frozen_copy_of_an_adapter_that_was_trained_before() -> None:
    assert 'add_adapter("ref"' in inspect.getsource(DPOTrainer.__init__)
    assert '"ref"' in inspect.getsource(DPOTrainer.compute_ref_log_probs)
    assert "adapter_name" in inspect.signature(use_adapter).parameters


def test_private_overrides_are_the_documented_ones() -> None:
    ours = {name for name in vars(PreferenceTrainer) if name.startswith("_") and not name.startswith("__")}
    inherited = {name for name in ours if hasattr(DPOTrainer, name)}
    assert inherited == {"_prepare_dataset"}


def test_losses_of_experts_come_from_trls_fused_head() -> None:
    """The one use of `model(..., fused_lm_head=True)`: its scores are those of our own head, with the loss beside."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        sliding_window=None,
    )
    model, layout = MixtralForCausalLM(config).eval(), Layout()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    layout.prepare(model)
    pairs = [example_of(pair) for pair in PAIRS]
    batch = layout.batch(pairs, 0)
    with torch.no_grad():
        ours = score_responses(model, batch, layout)
        theirs = score_responses(model, batch, layout, router_logits=True)
    for name in ("logps", "lengths", "entropy", "mean_logits", "top1"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name))
    assert ours.router_loss is None
    assert theirs.router_loss is not None
    assert float(theirs.router_loss) > 0


PAIRS = [
    {"row_index": 0, "prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6]], "ranks": [0, 1]},
    {"row_index": 1, "prompt_ids": [7, 8], "response_ids": [[9], [10, 11]], "ranks": [0, 1]},
]


def test_padded_rows_are_trls() -> None:
    ours = ComparisonCollator(Layout(), pad_token_id=0)(PAIRS)
    pairs = [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": row["response_ids"][0],
            "rejected_ids": row["response_ids"][1],
        }
        for row in PAIRS
    ]
    theirs = dpo_trainer.DataCollatorForPreference(pad_token_id=0)(pairs)
    assert ours["row_index"].tolist() == [0, 1]
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_no_telemetry() -> None:
    """TRL tells the hub of every trainer it makes; importing the training room turns that off."""
    import subprocess
    import sys

    from tests.cli.conftest import environment

    clean = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    program = "import prefopt_cli.training.arguments, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean)
    assert done.stdout.strip() == "True", done.stderr
