"""Weights of a few bits: which, how many bytes, and that they compute the same with and without gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from prefopt_cli.errors import UserError
from prefopt_cli.models import loading, quantising
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.models.quantised import (
    quantised_layers,
    take_dequantised,
    weight_bytes,
)
from prefopt_cli.recipe.quantization_settings import QuantizationSettings
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings

pytest.importorskip("bitsandbytes")

LORA = LoraAdapter(type="lora", r=4, lora_alpha=8)
QUANTISED = ("Linear4bit", "Linear8bitLt")
SETTINGS = {
    "nf4": {"bits": 4},
    "single": {"bits": 4, "double_quant": False, "quant_type": "fp4"},
    "stored as bfloat16": {"bits": 4, "storage_dtype": "bfloat16"},
    "8 bits": {"bits": 8},
    "without some": {"bits": 8, "skip_modules": ["o_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PolicySource:
    """A Llama with blocks that do not fill a block of scales, and sizes that differ."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return PolicySource(str(folder))


def settings_of(source: PolicySource) -> ModelSettings:
    return ModelSettings(name_or_path=source.weights)


def quantised(source: PolicySource, **settings: Any) -> PolicySource:
    return PolicySource(
        source.weights,
        source.adapter,
        quantization=quantising.settled(QuantizationSettings(**settings), "cpu"),
    )


def bytes_in_memory(model: nn.Module) -> int:
    """Of all parameters, and of all tensors that bitsandbytes keeps beside them, counted by their memory."""
    found: dict[int, int] = {}
    for parameter in model.parameters():
        tensors = [parameter.data, getattr(parameter, "SCB", None)]
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code] if state.state2 else []
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "with an adapter"])
def test_bytes_are_those_in_memory(base: PolicySource, settings: dict[str, Any], adapted: bool) -> None:
    source = quantised(base, **settings)
    model = loading.load_model(source, settings_of(source), LORA)
    real = {name for name, module in model.named_modules() if type(module).__name__ in QUANTISED}
    skeleton: Any = loading.on_meta_device(source, settings_of(source), LORA)
    if adapted:
        model = get_peft_model(model, loading.adapter_config(LORA))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    else:
        skeleton = skeleton.unload()
    assert set(quantised_layers(skeleton, source.quantization)) == real
    assert weight_bytes(skeleton, source.quantization) == bytes_in_memory(model)


def test_bytes_of_unquantised_weights(base: PolicySource) -> None:
    model = loading.load_model(base, settings_of(base), "none")
    assert weight_bytes(model, None) == bytes_in_memory(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_modes_compute_the_same(base: PolicySource, bits: int) -> None:
    """A reference runs in eval mode without gradients, a policy in training mode with them."""
    source = quantised(base, bits=bits)
    model = loading.load_model(source, settings_of(source), LORA)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        scored = model.eval()(tokens).logits
    model.get_input_embeddings().weight.requires_grad_(True)
    assert torch.equal(model.train()(tokens).logits, scored)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_weights_compute_the_same(base: PolicySource, bits: int) -> None:
    source = quantised(base, bits=bits)
    model = loading.load_model(source, settings_of(source), LORA).eval()
    plain = loading.load_model(base, settings_of(base), "none").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = plain(tokens).logits
        take_dequantised(plain, model)
        assert torch.allclose(plain(tokens).logits, model(tokens).logits, atol=1e-5)
        assert not torch.allclose(plain(tokens).logits, before, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_transposed_layers(tmp_path: Path, bits: int) -> None:
    """Those of GPT-2 hold their weights turned round."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    base = PolicySource(str(tmp_path))
    source = quantised(base, bits=bits)
    model = loading.load_model(source, settings_of(source), LORA).eval()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert weight_bytes(skeleton, source.quantization) == bytes_in_memory(model)
    plain = loading.load_model(base, settings_of(base), "none").eval()
    take_dequantised(plain, model)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, model(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("adapter", [LORA, LORA.model_copy(update={"use_dora": True})], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_model_without_weights_has_the_adapter_of_training(
    base: PolicySource, bits: int, adapter: LoraAdapter
) -> None:
    """A and B in bfloat16, as TRL trains them on such weights, magnitudes in float32."""
    source = quantised(base, bits=bits)
    skeleton = loading.on_meta_device(source, settings_of(source), adapter)
    trained = {name: each.dtype for name, each in skeleton.named_parameters() if each.requires_grad}
    assert {dtype for name, dtype in trained.items() if "magnitude" not in name} == {torch.bfloat16}
    magnitudes = {dtype for name, dtype in trained.items() if "magnitude" in name}
    assert magnitudes == ({torch.float32} if adapter.use_dora else set())


MISTAKES = {
    "a module that is not there": ({"skip_modules": ["o_prj"]}, {}, "the model has no module 'o_prj'"),
    "no pattern": ({"skip_modules": ["*"]}, {}, r"'\*' is no pattern"),
    "nothing left": ({"skip_modules": ["model"]}, {}, "none of the model's layers would be quantised"),
    "trained whole": ({}, {"modules_to_save": ["o_proj"]}, r"skip_modules: \[o_proj\]"),
}


@pytest.mark.parametrize(("settings", "changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_settings_that_do_not_fit_the_model(
    base: PolicySource, settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    source = quantised(base, bits=4, **settings)
    with pytest.raises(UserError, match=message):
        loading.on_meta_device(source, settings_of(source), LORA.model_copy(update=changes))


def test_what_does_not_work_is_refused_before_weights_are_read(
    base: PolicySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bits: int, device: str) -> None:
        raise NotImplementedError("no kernel for int8")

    quantising.require_working.cache_clear()
    monkeypatch.setattr(quantising, "_try_layer", fails)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    source = quantised(base, bits=8)
    with pytest.raises(
        UserError, match=r"bits: 8: .*processor \(no kernel for int8\)\. Write quantization\.bits: 4"
    ):
        loading.load_model(source, settings_of(source), LORA)
    monkeypatch.setattr(quantising, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="bitsandbytes, which quantises the weights, is not installed"):
        quantising.require_working(4, "cpu")


def test_compute_types() -> None:
    left_open = QuantizationSettings(bits=4)
    assert quantising.settled(left_open, "cpu").compute_dtype == "float32"
    asked = QuantizationSettings(bits=4, compute_dtype="bfloat16")
    assert quantising.settled(asked, "cpu") == asked


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_compute_types_of_gpus(has_bfloat16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    left_open = QuantizationSettings(bits=4)
    settled = quantising.settled(left_open, "cuda")
    assert settled.compute_dtype == dtype
    note = quantising.numbers_note(settled, left_open, "cuda")
    assert (note is None) == has_bfloat16
