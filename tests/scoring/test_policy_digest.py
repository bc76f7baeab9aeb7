"""The digest is the same for the same policy, wherever it lies, and another for another policy."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prefopt_cli.scoring import policy_digest as module
from prefopt_cli.scoring.policy_digest import policy_digest
from tests.cli.conftest import environment

NUMERICS = {"autocast": "no", "device": "cpu"}


def digest(model: nn.Module) -> str:
    return policy_digest(model, numerics=NUMERICS)


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **settings})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def adapted(seed: int = 1, **settings: Any) -> PeftModel:
    """A LoRA that does something, on the model of seed 0."""
    chosen = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **chosen)).eval()
    randomise(model, "default", seed)
    return model


def randomise(model: PeftModel, adapter: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                parameter.normal_(std=0.1)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


@pytest.mark.parametrize("make", [llama, gpt2])
def test_two_folders_and_two_processes(make: Any, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        make().save_pretrained(folder)
    digests = {digest(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders}
    program = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "from prefopt_cli.scoring.policy_digest import policy_digest\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation='eager', use_cache=False)\n"
        f"print(policy_digest(model, numerics={NUMERICS!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folders[0])],
        capture_output=True, text=True, env={**environment(), "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert {*digests, done.stdout.strip()} == {digest(make())}, done.stderr


def test_one_weight_one_bit() -> None:
    model = llama()
    before = digest(model)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.view(torch.int32)[3, 5] ^= 1
    assert digest(model) != before


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_change_the_scores(settings: dict[str, Any]) -> None:
    one, two = llama(), llama(**settings)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(logits(one), logits(two))
    assert digest(one) != digest(two)


def test_settings_that_do_not() -> None:
    model = llama()
    before = digest(model)
    model.config.use_cache = False
    model.config.attention_dropout = 0.5
    model.config._name_or_path = "elsewhere"
    model.config.transformers_version = "9.9"
    model.config.initializer_range = 0.5
    model.set_attn_implementation("eager")
    assert digest(model) == before


def test_numerics_and_dtype() -> None:
    half = llama().to(torch.bfloat16)
    other = policy_digest(llama(), numerics={**NUMERICS, "autocast": "bf16"})
    assert len({digest(llama()), digest(half), other}) == 3
    assert digest(half) == digest(llama().to(torch.bfloat16))


def test_buffers_count() -> None:
    model, changed = llama(), llama()
    for each, value in ((model, 1), (changed, 2)):
        each.register_buffer("packed", torch.full((3,), value, dtype=torch.uint8))
    assert digest(model) != digest(changed)


def test_tied_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    plain = module._piece_digest
    monkeypatch.setattr(module, "_piece_digest", lambda *given: count.append(1) or plain(*given))
    model = llama(tie_word_embeddings=True)
    digest(model)
    assert len(count) == sum(1 for _ in model.parameters())


def test_pieces_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces see every byte, and a transposed tensor is its values, not its memory."""
    monkeypatch.setattr(module, "PIECE", 40)
    model = llama()
    before = digest(model)
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert digest(model) == before
    with torch.no_grad():
        weight[-1, -1] += 1
    assert digest(model) != before


def test_adapter_of_two_folders(tmp_path: Path) -> None:
    model = adapted()
    digests = set()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        digests.add(digest(PeftModel.from_pretrained(llama(), tmp_path / name)))
    assert digests == {digest(model)}


def test_adapter_settings() -> None:
    plain = digest(adapted())
    differing = [
        adapted(lora_alpha=8),
        adapted(use_rslora=True),
        adapted(seed=2),
        adapted().merge_and_unload(),
        llama(),
    ]
    assert len({plain, *map(digest, differing)}) == 6
    assert digest(adapted(lora_dropout=0.3)) == plain


def test_scaling_that_was_changed_later() -> None:
    model = adapted()
    before = digest(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 0.25)
    assert digest(model) != before


def test_merged_in_place() -> None:
    model = adapted()
    digests = [digest(model)]
    model.merge_adapter()
    digests.append(digest(model))
    assert len({*digests, digest(llama()), digest(adapted().merge_and_unload())}) == 4


def test_adapter_that_is_switched_off() -> None:
    model = adapted(modules_to_save=["lm_head"])
    on = digest(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
        assert digest(model) == digest(llama())
    assert digest(model) == on != digest(llama())


def test_only_the_active_adapter_counts_and_its_name_does_not() -> None:
    alone, both = adapted(), adapted()
    both.add_adapter("reference", copy.deepcopy(both.peft_config["default"]))
    randomise(both, "reference", 5)
    assert digest(both) == digest(alone)
    both.set_adapter("reference")
    assert digest(both) == digest(adapted(seed=5)) != digest(alone)


def test_quantised_weights_with_other_scales() -> None:
    """Packed weights are equal where only the scale differs, and the scale is neither parameter nor buffer."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised(scale: float) -> nn.Module:
        torch.manual_seed(0)
        source = nn.Linear(64, 64, bias=False)
        linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        linear.load_state_dict({"weight": source.weight.data * scale})
        return nn.Sequential(linear.to("cpu"))

    one, two = quantised(1.0), quantised(2.0)
    assert one[0].weight.dtype == torch.uint8
    assert torch.equal(one[0].weight.data, two[0].weight.data)
    assert digest(one) != digest(two)
    assert digest(one) == digest(quantised(1.0))
