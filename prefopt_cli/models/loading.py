"""Configuration, tokenizer and weights of a policy, through transformers and peft."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt_cli.errors import UserError
from prefopt_cli.models.adapters import (
    EARLIER_ADAPTER,
    TRAINED_ADAPTER,
    require_same_adapter,
    require_stackable,
    stack_adapter,
)
from prefopt_cli.models.generation_settings import mend_generation_settings
from prefopt_cli.models.loading_errors import loading_errors
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.models.quantised import (
    compute_in_bfloat16,
    is_quantised,
    keep_trainable,
    stores_few_bits,
)
from prefopt_cli.models.quantising import bits_and_bytes, require_layers, require_working, settled
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings

CHECKPOINT_DTYPE = "auto"
"""What transformers calls the type that the checkpoint was saved in."""


def load_config(source: PolicySource, settings: ModelSettings) -> Any:
    """The model's configuration; no weights are touched.

    Raises:
        UserError: it cannot be had, or is of an architecture that transformers does not know.
    """
    with loading_errors(source.place, local=source.is_local):
        return AutoConfig.from_pretrained(source.weights, **_hub_arguments(source, settings))


def load_tokenizer(source: PolicySource, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the policy, with the recipe's chat template if it names one.

    Raises:
        UserError: there is none, or the template file cannot be read.
    """
    folder = (
        source.adapter if source.adapter and (source.adapter / "tokenizer_config.json").is_file() else None
    )
    local = folder is not None or source.is_local
    with loading_errors(str(folder or source.place), "the tokenizer of model", local=local):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder or source.weights), **_hub_arguments(source, settings)
        )
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = Path(settings.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.chat_template: {settings.chat_template} cannot be read: {error}"
            ) from error
    return tokenizer


def load_model(
    source: PolicySource,
    settings: ModelSettings,
    adapter: LoraAdapter | str,
    *,
    frozen: bool = False,
    device: torch.device | str | None = None,
) -> PreTrainedModel | PeftModel:
    """The policy with its weights, on the CPU; quantised ones on the device that they are for.

    An adapter that belongs to the policy stays one when the recipe trains an adapter, and is merged into
    the weights when the recipe trains all of them, unless these are quantised and would round it. A new
    adapter is not added here (see `new_adapter`).

    Args:
        source: where the policy is, and how its weights are quantised.
        settings: the recipe's.
        adapter: the recipe's.
        frozen: whether an adapter that belongs to the policy is not to be trained further; it may be any then.
        device: this process's; None: the GPU that it uses, or the CPU where there is none.

    Raises:
        UserError: the weights cannot be had, or not be quantised here, or the adapter in place is not the one the
            recipe describes.
    """
    if isinstance(adapter, LoraAdapter) and not frozen:
        require_same_adapter(source, adapter)
    quantising = _quantising(source, settings, device)
    with loading_errors(source.place, local=source.is_local):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only to be refused in better words
            dtype=weights_dtype(settings, adapter),
            use_safetensors=True,
            **({"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}),
            **quantising,
            **_hub_arguments(source, settings),
        )
    faulty = {
        "are not": loaded["missing_keys"],
        "have another shape": [key for key, *_ in loaded["mismatched_keys"]],
    }
    _require_all_weights(f"model {source.place}", faulty)
    mend_generation_settings(model, source)
    keep_trainable(model)
    if source.adapter is None:
        return model
    trains_adapter = isinstance(adapter, LoraAdapter)
    with_adapter = _load_adapter(model, source.adapter, is_trainable=trains_adapter and not frozen)
    if trains_adapter or is_quantised(model):
        return with_adapter
    # peft froze the weights under the adapter; merged, they are what is trained.
    merged: PreTrainedModel = with_adapter.merge_and_unload().requires_grad_(True)
    return merged


def _quantising(
    source: PolicySource, settings: ModelSettings, device: torch.device | str | None
) -> dict[str, Any]:
    """How the weights are quantised, for the library, and where to.

    Raises:
        UserError: they cannot be, on this device.
    """
    config = load_config(source, settings)
    if source.quantization is None:
        return {} if device is None or not stores_few_bits(config) else {"device_map": {"": device}}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    require_working(source.quantization.bits, device.type)
    quantization = settled(source.quantization, device.type)
    where = {"": device if device.index is not None or device.type == "cpu" else torch.cuda.current_device()}
    model = _without_weights(source, settings, config, torch.float32)
    return {"quantization_config": bits_and_bytes(quantization, model), "device_map": where}


def weights_dtype(settings: ModelSettings, adapter: LoraAdapter | str) -> torch.dtype | str:
    """Type of the loaded weights.

    Weights that are trained must be able to hold small updates, so `auto` means float32 for them (mixed
    precision comes from autocast); frozen weights stay as the checkpoint has them.
    """
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    return CHECKPOINT_DTYPE if isinstance(adapter, LoraAdapter) else torch.float32


def new_adapter(source: PolicySource, adapter: LoraAdapter | str) -> LoraConfig | None:
    """The adapter to be added to the policy, if the recipe wants one and the policy has none."""
    if not isinstance(adapter, LoraAdapter) or source.adapter is not None:
        return None
    return adapter_config(adapter)


def adapter_config(adapter: LoraAdapter) -> LoraConfig:
    """A recipe's adapter in peft's words."""
    return LoraConfig(task_type="CAUSAL_LM", **adapter.model_dump(exclude={"type"}))


def on_meta_device(
    source: PolicySource, settings: ModelSettings, adapter: LoraAdapter | str, *, stacked: bool = False
) -> PreTrainedModel | PeftModel:
    """The policy as it will be trained, without any weights: for counting, estimating, and early refusals.

    With `stacked`, an adapter that belongs to the policy stays as it is and gets a new one on top. Layers that will be
    quantised are there in the model's own type; `quantised.weight_bytes` counts what becomes of them.

    Raises:
        UserError: no such model can be built, or the adapter does not fit it.
    """
    config = load_config(source, settings)
    dtype = weights_dtype(settings, adapter)
    dtype = (config.dtype or torch.float32) if dtype == CHECKPOINT_DTYPE else dtype
    model = _without_weights(source, settings, config, dtype)
    if source.quantization is not None:
        require_layers(model, source.quantization, adapter)
    if not isinstance(adapter, LoraAdapter):
        return model
    adapted = _with_adapter(model, source, adapter, stacked=stacked)
    if source.quantization is not None or stores_few_bits(config):
        for each in adapted.peft_config:
            compute_in_bfloat16(adapted, each)
    return adapted


def _without_weights(
    source: PolicySource, settings: ModelSettings, config: Any, dtype: torch.dtype | str
) -> PreTrainedModel:
    with torch.device("meta"), loading_errors(source.place, local=source.is_local):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            **({"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}),
        )


def _with_adapter(
    model: PreTrainedModel, source: PolicySource, adapter: LoraAdapter, *, stacked: bool
) -> PeftModel:
    """A model without weights with the adapters that it will have."""
    if source.adapter is None:
        return _with_new_adapter(model, adapter)
    (require_stackable if stacked else require_same_adapter)(source, adapter)
    with torch.device("meta"), loading_errors(str(source.adapter), local=True):
        config = LoraConfig.from_pretrained(str(source.adapter))
        config.inference_mode = False  # as it was saved
        if not stacked:
            return get_peft_model(model, config)
        earlier = get_peft_model(model, config, EARLIER_ADAPTER)
        return stack_adapter(earlier, adapter_config(adapter), seed=0)


def _with_new_adapter(model: PreTrainedModel, adapter: LoraAdapter) -> PeftModel:
    modules = [name for name, _ in model.named_modules()]
    linear = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for field in ("target_modules", "modules_to_save"):
        wanted = getattr(adapter, field)
        # peft itself objects only where none of the names matches.
        for name in wanted if isinstance(wanted, list) else ():
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise UserError(
                    f"adapter.{field}: the model has no module {name!r}; its linear ones are "
                    f"{', '.join(sorted(linear))}."
                )
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter_config(adapter))
    except (ValueError, re.error) as error:
        raise UserError(f"adapter: {' '.join(str(error).split())}") from error
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "adapter.target_modules: the language-model head cannot carry an adapter, which would never be trained. "
            "Leave it out, or train all of it: modules_to_save: [lm_head]."
        )
    return adapted


def _load_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool) -> PeftModel:
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"The adapter {folder} has no {weights.name}; pickled weights are not loaded.")
    with loading_errors(str(folder), "the adapter", local=True):
        name = TRAINED_ADAPTER if is_trainable else EARLIER_ADAPTER
        adapted = PeftModel.from_pretrained(model, str(folder), name, is_trainable=is_trainable)
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    _require_all_weights(f"The adapter {folder}", {"are not": set(expected) - saved})
    if is_quantised(model):
        compute_in_bfloat16(adapted, name)
    return adapted


def _require_all_weights(what: str, faulty: Mapping[str, Iterable[str]]) -> None:
    """Refuse weights that do not fill the model: the libraries would fill the rest at random."""
    for fault, names in faulty.items():
        listed = sorted(names)
        if listed:
            raise UserError(
                f"{what} is incomplete: {len(listed)} of the parameters that its configuration describes {fault} in "
                f"its weights ({', '.join(listed[:3])}{', ...' if len(listed) > 3 else ''}). Both must be of one model."
            )


def _hub_arguments(source: PolicySource, settings: ModelSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.revision is not None and not source.is_local:
        arguments["revision"] = settings.revision
    return arguments
