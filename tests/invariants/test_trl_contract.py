"""The few things of TRL's and transformers' insides that prefopt leans on. When one of these fails after an
upgrade, `training/trainer.py` or `scoring/forward.py` must follow."""

import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from prefopt_cli.scoring.forward import score_responses, with_fused_head
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


def test_private_overrides_are_the_documented_ones() -> None:
    ours = {name for name in vars(PreferenceTrainer) if name.startswith("_") and not name.startswith("__")}
    inherited = {name for name in ours if hasattr(DPOTrainer, name)}
    assert inherited == {"_prepare_dataset"}


def test_fused_head_equals_log_softmax_of_the_plain_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    batch = {
        "input_ids": torch.randint(1, 50, (4, 9)),
        "attention_mask": torch.ones(4, 9, dtype=torch.long),
        "completion_mask": torch.tensor([[0] * 3 + [1] * 4 + [0] * 2, [0] * 5 + [1] * 4] * 2),
    }
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    scores = score_responses(with_fused_head(model), batch)
    mask, targets = batch["completion_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
    log_probs = logits.log_softmax(-1)

    def expected(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum(1)

    torch.testing.assert_close(scores.logps, expected(log_probs.gather(-1, targets[..., None])[..., 0]))
    torch.testing.assert_close(scores.entropy, expected(-(log_probs.exp() * log_probs).sum(-1)))
    torch.testing.assert_close(scores.mean_logits, expected(logits.mean(-1)))
    torch.testing.assert_close(scores.top1, expected((logits.argmax(-1) == targets).float()))
    assert scores.lengths.tolist() == [4, 4, 4, 4]


def test_batch_layout_is_trls() -> None:
    from prefopt_cli.training.batches import PairCollator

    pairs = [
        {"pair_index": 0, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"pair_index": 1, "prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
    ]
    ours = PairCollator(pad_token_id=0)(pairs)
    theirs = dpo_trainer.DataCollatorForPreference(pad_token_id=0)(pairs)
    assert ours.pop("pair_index").tolist() == [0, 1]
    assert set(ours) == set(theirs)
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
