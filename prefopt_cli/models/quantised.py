"""Models whose weights are stored in a few bits each (bitsandbytes), with adapters that are trained on them."""

import math
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from prefopt_cli.recipe.quantization_settings import QuantizationSettings

PACKS_FOR_INFERENCE = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' 4-bit layers: whether they may be stored in another order, for good, by a pass without
gradients on the CPU. There is no gradient through weights in that order, and no error says so."""

QUANTISED_WEIGHTS = ("Params4bit", "Int8Params")
"""bitsandbytes' classes of them, by name: it is no part of every installation."""

FOUR_BIT_LAYER, EIGHT_BIT_LAYER = "Linear4bit", "Linear8bitLt"
"""bitsandbytes' classes of layers."""

BLOCK = 64
"""Weights of 4 bits that have one scale."""

SCALES_BLOCK = 256
"""Scales that have one scale of their own, where they are quantised too."""

FLOAT32_BYTES = 4

LEVELS_BYTES = 16 * FLOAT32_BYTES
"""The table of the 16 values that 4 bits stand for, one for each layer."""

SCALES_LEVELS_BYTES = 256 * FLOAT32_BYTES + FLOAT32_BYTES
"""The table for scales of 8 bits, and their mean."""


def is_quantised(model: nn.Module) -> bool:
    """Whether a loaded model's weights are stored in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def stores_few_bits(config: Any) -> bool:
    """Whether the weights that a configuration belongs to are stored quantised."""
    return getattr(config, "quantization_config", None) is not None


def keep_trainable(model: nn.Module) -> None:
    """See to it that quantised weights on the CPU compute the same with and without gradients, and have some.

    Those of 8 bits are computed with in another way in eval mode there, where a reference runs: their inputs are
    rounded to 8 bits too.
    """
    for module in model.modules():
        if hasattr(module, PACKS_FOR_INFERENCE):
            setattr(module, PACKS_FOR_INFERENCE, False)
        if type(module).__name__ == EIGHT_BIT_LAYER:
            module.register_forward_pre_hook(_as_in_training)


def _as_in_training(layer: Any, _: Any) -> None:
    """Such a layer does nothing else by its mode than to choose how it computes."""
    layer.training = True
    if layer.weight.CB is not None and layer.weight.SCB is None:
        # peft has moved the weight to the processor, where it was, for DoRA; the scales stayed behind.
        layer.weight.SCB = layer.state.SCB


def compute_in_bfloat16(model: nn.Module, adapter: str) -> None:
    """Make an adapter on quantised weights what TRL makes it when it trains it, wherever it is only read, too.

    Otherwise a policy and its reference would be computed in different numbers, and differ before the first step.
    """
    for name, parameter in model.named_parameters():
        of_adapter = parameter.requires_grad or f".{adapter}." in name
        if of_adapter and "lora_magnitude_vector" not in name and parameter.dtype != torch.bfloat16:
            parameter.data = parameter.data.to(torch.bfloat16)


def compute_in_float32(model: nn.Module) -> None:
    """Have a model computed exactly, whatever its adapter was trained in and its folder says; few bits stay few."""
    for parameter in model.parameters():
        if type(parameter).__name__ not in QUANTISED_WEIGHTS and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if type(module).__name__ == FOUR_BIT_LAYER:
            module.compute_dtype = torch.float32  # type: ignore[assignment]


@torch.no_grad()
def take_dequantised(model: nn.Module, quantised: nn.Module) -> None:
    """Give a model the weights of its quantised twin, as these are when they are computed with."""
    from transformers.integrations.bitsandbytes import (
        dequantize_bnb_weight,
    )  # takes a second for bitsandbytes

    for name, layer in quantised.named_modules():
        weight = getattr(layer, "weight", None)
        if type(weight).__name__ not in QUANTISED_WEIGHTS:
            continue
        plain: Any = model.get_submodule(name)
        dequantised = dequantize_bnb_weight(weight, getattr(layer, "state", None)).to(plain.weight.dtype)
        # The library turns the weights of such layers round.
        plain.weight.copy_(dequantised.T if isinstance(plain, Conv1D) else dequantised)


def kept_modules(model: Any, quantization: QuantizationSettings) -> list[str]:
    """Names, endings of names and patterns of the modules that stay as they are.

    Args:
        model: a causal language model of transformers without adapters, on any device.
        quantization: how the others are stored. Its `skip_modules` come on top of what the library leaves alone, the
            language-model head above all.
    """
    keep = getattr(model, "_keep_in_fp32_modules", None)
    kept = HfQuantizer.get_modules_to_not_convert(
        model, quantization.skip_modules, keep, add_default_skips=True
    )
    return sorted(kept)


def quantised_layers(model: Any, quantization: QuantizationSettings) -> dict[str, nn.Module]:
    """The layers whose weights will be quantised, by their names in the model without adapters.

    Args:
        model: a causal language model that is not quantised yet, or a `PeftModel` around one; on any device.
        quantization: how it will be.
    """
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    layers: dict[str, nn.Module] = {}
    kept = kept_modules(bare, quantization)
    for name, module in bare.named_modules():
        plain = name.removesuffix(".base_layer")
        is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if is_linear and not _of_adapter(name) and should_convert_module(plain, kept):
            layers[plain] = module
    return layers


def weight_bytes(model: nn.Module, quantization: QuantizationSettings | None) -> int:
    """Bytes of all parameters of a model once its weights are quantised.

    Args:
        model: not quantised yet, with or without adapters, on any device; see `loading.on_meta_device`.
        quantization: how its linear layers will be stored; None: as they are.
    """
    stored = quantised_layers(model, quantization) if quantization else {}
    weights = {id(layer.weight): layer.weight for layer in stored.values()}
    plain = [each for each in model.parameters() if id(each) not in weights]
    total = sum(each.numel() * each.element_size() for each in plain)
    if quantization is None:
        return total
    return total + sum(quantised_bytes(layer, quantization) for layer in stored.values())


def quantised_bytes(layer: Any, quantization: QuantizationSettings) -> int:
    """Bytes of a linear layer's quantised weight and of what belongs to it."""
    count = layer.weight.numel()
    if quantization.bits == 8:  # and one scale for each output
        outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        return count + FLOAT32_BYTES * outputs
    unit = torch.empty(0, dtype=getattr(torch, quantization.storage_dtype)).element_size()
    packed = math.ceil(math.ceil(count / 2) / unit) * unit
    scales = math.ceil(count / BLOCK)
    if not quantization.double_quant:
        return packed + FLOAT32_BYTES * scales + LEVELS_BYTES
    of_scales = FLOAT32_BYTES * math.ceil(scales / SCALES_BLOCK) + SCALES_LEVELS_BYTES
    return packed + scales + of_scales + LEVELS_BYTES


def _of_adapter(name: str) -> bool:
    """Whether a module is peft's own: a part of an adapter, or the copy of a module that is trained whole."""
    return ".lora_" in name or ".modules_to_save." in name
