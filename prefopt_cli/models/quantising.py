"""Weights quantised while they are loaded: a recipe's settings in bitsandbytes' words, and what is refused before."""

import functools
import re
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.models.quantised import kept_modules, quantised_layers, stores_few_bits
from prefopt_cli.recipe.launch_checks import cannot_be_sharded
from prefopt_cli.recipe.quantization_settings import QuantizationSettings
from prefopt_cli.recipe.schema import LoraAdapter, Recipe

BITS_AND_BYTES = "bitsandbytes"

SIDE = 64
"""Of the layer that is tried: one block of 4-bit weights for each output."""


def computing_device(recipe: Recipe) -> str:
    """The kind of device that a run of the recipe computes on here."""
    return "cuda" if torch.cuda.is_available() and not recipe.training.get("use_cpu") else "cpu"


def quantised_start(
    source: PolicySource, recipe: Recipe, config: Any, sharding: tuple[str, int] | None = None
) -> PolicySource:
    """The policy that a recipe starts from, its weights quantised as the recipe has it.

    A folder whose weights are quantised already keeps its own settings. A run's adapter goes on where it was trained,
    on weights of the same few bits.

    Args:
        source: as the recipe names it; of a run, quantised as the run was.
        recipe: of the run to come.
        config: the source's model configuration.
        sharding: the engine that the run's processes share the model by, and its ZeRO stage; None: the recipe's.

    Raises:
        UserError: the weights, or the adapter's run, were quantised in another way, all weights are to be trained
            and have few bits, or the engine cannot take such weights apart.
    """
    wanted = recipe.quantization if isinstance(recipe.quantization, QuantizationSettings) else None
    adapts = isinstance(recipe.adapter, LoraAdapter)
    sharding = sharding or (recipe.launch.engine, recipe.launch.zero_stage)
    if stores_few_bits(config):
        _require_own_bits(source, wanted, config)
        if not adapts:
            raise UserError(
                f"adapter: none: the weights of {source.place} are quantised, and cannot be trained themselves. Add "
                "adapter: {type: lora, r: 16}, or start from unquantised weights."
            )
        _require_whole(source, own_quantization(config), *sharding)
        return replace(source, quantization=None)
    if source.adapter is not None and (source.run is not None or source.quantization is not None):
        _require_same_bits(source, wanted, adapts=adapts)
    _require_whole(source, wanted, *sharding)
    return replace(source, quantization=settled(wanted, computing_device(recipe)) if wanted else None)


def computed_as(source: PolicySource, recipe: Recipe) -> PolicySource:
    """The policy, computed in the numbers of a run of the recipe; which weights it has is not touched."""
    wanted = recipe.quantization
    if source.quantization is None or not isinstance(wanted, QuantizationSettings):
        return source
    here = settled(wanted, computing_device(recipe))
    numbers = {"compute_dtype": here.compute_dtype, "storage_dtype": here.storage_dtype}
    return replace(source, quantization=source.quantization.model_copy(update=numbers))


def settled(quantization: QuantizationSettings, device: str) -> QuantizationSettings:
    """With the type to compute in, where that is left open: float32 on the CPU, else the GPU's best half precision."""
    if quantization.compute_dtype != "auto":
        return quantization
    dtype = "float32"
    if device == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return quantization.model_copy(update={"compute_dtype": dtype})


def numbers_note(quantization: QuantizationSettings | None, wanted: Any, device: str) -> str | None:
    """What a user should know of the type that quantised weights are computed in."""
    if quantization is None or quantization.bits != 4:
        return None
    if device == "cuda" and quantization.compute_dtype == "float16" and wanted.compute_dtype == "auto":
        return "Quantised weights are computed in float16: this GPU has no bfloat16."
    if device == "cpu" and quantization.compute_dtype == "float16":
        return (
            "quantization.compute_dtype: float16 is about a hundred times slower on a processor than float32 or "
            "bfloat16; leave it out."
        )
    return None


def own_quantization(config: Any) -> QuantizationSettings | None:
    """How weights that are stored quantised were quantised; None where they are not, or not by bitsandbytes."""
    found = _stored(config)
    if found.get("quant_method") != BITS_AND_BYTES:
        return None
    four = bool(found.get("load_in_4bit", found.get("_load_in_4bit")))
    of_bits: dict[str, Any] = {"threshold": found.get("llm_int8_threshold")}
    if four:
        of_bits = {
            "quant_type": found.get("bnb_4bit_quant_type"),
            "double_quant": found.get("bnb_4bit_use_double_quant"),
            "compute_dtype": found.get("bnb_4bit_compute_dtype"),
            "storage_dtype": found.get("bnb_4bit_quant_storage"),
        }
    given = {name: value for name, value in of_bits.items() if value is not None}
    # Whatever is in the file: it is not for a recipe to judge.
    skipped = found.get("llm_int8_skip_modules")
    return QuantizationSettings.model_construct(bits=4 if four else 8, skip_modules=skipped, **given)


def bits_and_bytes(quantization: QuantizationSettings, model: Any) -> BitsAndBytesConfig:
    """The settings in the library's words.

    Args:
        quantization: with a settled `compute_dtype`.
        model: without weights, for the names of what stays as it is.
    """
    kept = kept_modules(model, quantization) if quantization.skip_modules else None
    if quantization.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(quantization.threshold), llm_int8_skip_modules=kept
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.storage_dtype),
        llm_int8_skip_modules=kept,
    )


def require_layers(model: Any, quantization: QuantizationSettings, adapter: LoraAdapter | str) -> None:
    """Refuse settings that do not fit the model.

    Args:
        model: without weights and adapters.
        quantization: the recipe's.
        adapter: the recipe's.

    Raises:
        UserError: `skip_modules` names what is not there or leaves nothing to quantise, or a module is to be both
            quantised and trained whole.
    """
    names = [name for name, _ in model.named_modules() if name]
    for wanted in quantization.skip_modules or ():
        if not any(_is_named(name, wanted) for name in names):
            raise UserError(f"quantization.skip_modules: the model has no module {wanted!r}.")
    layers = quantised_layers(model, quantization)
    if not layers:
        raise UserError(
            "quantization: none of the model's layers would be quantised. Only linear layers are; see skip_modules."
        )
    for wanted in (adapter.modules_to_save or ()) if isinstance(adapter, LoraAdapter) else ():
        within = [name for name in layers if name.endswith(wanted) or f".{wanted}." in f".{name}."]
        if within:
            raise UserError(
                f"adapter.modules_to_save: {wanted} would be trained whole, and quantised weights ({within[0]}) cannot "
                f"be. Add it to quantization.skip_modules: [{wanted}]."
            )


def require_quantisation(recipe: Recipe) -> None:
    """Refuse at once what this machine cannot quantise; for the errors see `require_working`."""
    if isinstance(recipe.quantization, QuantizationSettings):
        require_working(recipe.quantization.bits, computing_device(recipe))


@functools.cache
def require_working(bits: Literal[4, 8], device: str) -> None:
    """Refuse now what would fail once the weights are read: one small layer is quantised and trained through.

    Raises:
        UserError: bitsandbytes is missing, or does not do it on this device.
    """
    if not is_bitsandbytes_available():
        raise UserError(
            "quantization: bitsandbytes, which quantises the weights, is not installed, or too old. Run `pip install "
            "-U bitsandbytes`, or write quantization: none."
        )
    try:
        _try_layer(bits, device)
    except Exception as error:  # whatever the library, or the library below it, has to say
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        other = "quantization.bits: 4" if bits == 8 else "quantization: none"
        raise UserError(
            f"quantization.bits: {bits}: bitsandbytes cannot train on weights of {bits} bits on this machine's "
            f"{'GPU' if device == 'cuda' else 'processor'} ({reason}). Write {other}, or train on a machine with an "
            "NVIDIA GPU."
        ) from error


def _try_layer(bits: int, device: str) -> None:
    from bitsandbytes import nn

    weight = torch.linspace(-1, 1, SIDE * SIDE).reshape(SIDE, SIDE)
    if bits == 4:
        layer: Any = nn.Linear4bit(SIDE, SIDE, bias=False, compute_dtype=torch.float32)
        layer.weight = nn.Params4bit(weight, requires_grad=False)
    else:
        layer = nn.Linear8bitLt(SIDE, SIDE, bias=False, has_fp16_weights=False)
        layer.weight = nn.Int8Params(weight, requires_grad=False)
    layer = layer.to(device)
    inputs = torch.ones(2, SIDE, device=device, requires_grad=True)
    layer(inputs).sum().backward()
    if inputs.grad is None or not torch.isfinite(inputs.grad).all():
        raise RuntimeError("no gradient passes through such weights")


def _stored(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    return dict(found) if isinstance(found, dict) else dict(found.to_dict())


def _require_own_bits(source: PolicySource, wanted: QuantizationSettings | None, config: Any) -> None:
    own = own_quantization(config)
    if wanted is None or (own is not None and own.bits == wanted.bits):
        return
    what = f"to {own.bits} bits" if own else f"by {_stored(config).get('quant_method', 'another method')}"
    raise UserError(
        f"quantization: the weights of {source.place} are quantised {what} already, and the recipe says bits: "
        f"{wanted.bits}. Write quantization: none to train on them as they are, or name the unquantised model."
    )


def _require_whole(
    source: PolicySource, quantization: QuantizationSettings | None, engine: str, zero_stage: int
) -> None:
    """Refuse an engine that would take apart what must stay whole; of the recipe's own words `check` says it before."""
    fault = cannot_be_sharded(quantization, engine, zero_stage) if quantization else None
    if quantization is None or fault is None:
        return
    kept = " in tensors of uint8" if fault == "storage" else ""
    remedy = "launch.zero_stage: 2" if fault == "stage" else "launch.engine: ddp"
    raise UserError(
        f"launch.engine: {engine}{' with zero_stage: 3' * (fault == 'stage')} takes weights apart, which those of "
        f"{source.place} do not bear: they are kept in {quantization.bits} bits{kept}. Write {remedy}, or start from "
        "unquantised weights."
    )


def _require_same_bits(source: PolicySource, wanted: QuantizationSettings | None, *, adapts: bool) -> None:
    """Refuse to move an adapter to weights that it was not trained on."""
    before = source.quantization
    if before is not None and not adapts:
        raise UserError(
            f"adapter: none: {source.place} was loaded in {before.bits} bits under the adapter {source.adapter}, "
            "and quantised weights cannot be trained. Make one plain model of both with `prefopt merge`, and start "
            "from that."
        )
    if (before and before.of_weights()) != (wanted and wanted.of_weights()):
        raise UserError(
            f"quantization: the adapter {source.adapter} was trained on {_words(before)} weights, and the recipe says "
            f"{_words(wanted)}. Write quantization: {before.to_text() if before else 'none'}, or make one plain model "
            "of both with `prefopt merge`, and start from that."
        )


def _words(quantization: QuantizationSettings | None) -> str:
    return quantization.describe() if quantization else "unquantised"


def _is_named(name: str, wanted: str) -> bool:
    """Whether the library takes `wanted` for a module of this name."""
    try:
        return not should_convert_module(name, [wanted])
    except re.error as error:
        raise UserError(f"quantization.skip_modules: {wanted!r} is no pattern: {error}.") from error
