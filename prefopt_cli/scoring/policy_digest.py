"""What a frozen policy is, in one digest: two policies with the same digest give the same scores."""

import enum
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 2**25
"""Bytes that are hashed, and brought from the accelerator, at once by each thread."""

THREADS = 8

BOOKKEEPING = {
    # names, places, versions
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "peft_version", "base_model_name_or_path",
    "revision", "architectures", "auto_map", "auto_mapping", "tokenizer_class", "task_type", "task_specific_params",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    # the tensors tell their own
    "dtype", "torch_dtype",
    # how it is computed and what else is returned, not what comes out; `numerics` has the rest
    "use_cache", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "attn_implementation", "_experts_implementation", "_experts_implementation_internal", "pretraining_tp",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "chunk_size_feed_forward",
    "gradient_checkpointing",
    # only for training, or only for generation
    "initializer_range", "initializer_factor", "init_lora_weights", "inference_mode", "router_aux_loss_coef",
    "bos_token_id", "eos_token_id",
    # where adapters were put; the names of their tensors say so
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    # how adapters began
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_config",
    "megatron_core", "ensure_weight_tying",
}  # fmt: skip
"""Settings that leave the log-probabilities as they are. What is not known counts: a digest too many costs time, one
too few gives wrong scores."""

DROPOUT = ("dropout", "pdrop", "dropout_prob", "layerdrop")
"""Endings of settings that only act in training."""


def policy_digest(model: nn.Module, *, numerics: Mapping[str, str]) -> str:
    """32 hexadecimal digits that stand for what a loaded policy computes.

    They depend on every parameter and persistent buffer (name, shape, dtype and bytes; tied ones once), on the
    class of the model, on its config as far as that changes what it computes, and on the adapters that are active.
    They depend neither on the folder nor the machine nor the device the model was loaded from or to. Adapters that
    are not active count for nothing: a model whose adapters are switched off has the digest of the bare model.
    Buffers that are not saved (rotary frequencies) follow from the config.

    It costs one pass over the weights at about 1 GB/s for every processor core, up to eight of them, and no more
    memory than a few pieces of 32 MiB. Tensors that are not contiguous are copied, one in each thread.

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one; quantised or not.
        numerics: whatever else changes the scores, such as ``{"autocast": "bf16", "device": "cuda"}``.
    """
    bare: Any = model.get_base_model() if _is_peft(model) else model  # type: ignore[operator]
    config: Any = getattr(bare, "config", None)
    settings = {
        "class": f"{type(bare).__module__}.{type(bare).__name__}",
        "config": _plain(config.to_dict() if config is not None else {}),
        "adapters": _adapters(model),
        "numerics": dict(numerics),
    }
    digest = hashlib.blake2b(_json(settings), digest_size=16)
    for line in _tensor_lines(model):
        digest.update(line)
    return digest.hexdigest()


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _plain(value: Any) -> Any:
    """A config's value without bookkeeping, in a form that has one spelling."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if not _is_bookkeeping(str(key))}
    if isinstance(value, set | frozenset):
        return sorted((_plain(inner) for inner in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _is_bookkeeping(key: str) -> bool:
    return key in BOOKKEEPING or key.endswith(DROPOUT)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _tuned_layers(model: nn.Module) -> Iterator[tuple[str, Any, list[str]]]:
    """(name, layer, adapters at work in it) of the layers that peft has changed."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "disable_adapters"):
            yield name, module, [] if module.disable_adapters else list(module.active_adapters)


def _numbers(model: nn.Module) -> dict[str, str]:
    """A number for each adapter that is at work; what it is called makes no difference."""
    names = dict.fromkeys(adapter for *_, at_work in _tuned_layers(model) for adapter in at_work)
    return {name: str(number) for number, name in enumerate(names)}


def _adapters(model: nn.Module) -> dict[str, Any]:
    """What the adapters' tensors do not say: how strongly each acts where, and what was merged."""
    numbers, layers = _numbers(model), {}
    for name, layer, at_work in _tuned_layers(model):
        scaling = getattr(layer, "scaling", {})
        own = {
            "active": [numbers[each] for each in at_work],
            "merged": [numbers.get(each, each) for each in getattr(layer, "merged_adapters", ())],
            "scaling": {numbers[each]: float(scaling[each]) for each in at_work if each in scaling},
        }
        if any(own.values()):
            layers[_bare_name(name)] = own
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    plain = {number: _plain(configs[name].to_dict()) for name, number in numbers.items() if name in configs}
    return {"layers": layers, "configs": plain}


def _bare_name(name: str) -> str:
    """The name that a tensor or module has in the model without peft."""
    for wrapping in ("base_layer.", "original_module."):
        name = name.replace(wrapping, "")
    return name.removeprefix("base_model.model.")


def _acting(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a forward pass uses, by names that have no adapter's name in them.

    ``state_dict`` also holds what quantised weights keep outside of parameters and buffers: their scales.
    """
    numbers = _numbers(model)
    parts = {
        f"{name}.{part}": {each: numbers[each] for each in at_work}
        for name, layer, at_work in _tuned_layers(model)
        for part in layer.adapter_layer_names
    }
    named = ((_acting_name(name, parts), value) for name, value in model.state_dict().items())
    return {name: value for name, value in named if name is not None}


def _acting_name(name: str, parts: Mapping[str, Mapping[str, str]]) -> str | None:
    """None for the tensor of an adapter that is not at work; `parts` says which are, where adapters have tensors."""
    words = name.split(".")
    for at in range(1, len(words)):
        if (at_work := parts.get(".".join(words[:at]))) is not None:
            if words[at] not in at_work:
                return None
            words[at] = at_work[words[at]]
            break
    return _bare_name(".".join(words))


def _tensor_lines(model: nn.Module) -> Iterator[bytes]:
    """A line for each tensor, sorted by name: name, shape, dtype and the digests of its pieces."""
    state = _acting(model)
    seen: dict[tuple[Any, ...], str] = {}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        pending: list[tuple[str, list[Any], list[Future[bytes]]]] = []
        for name in sorted(state):
            value = state[name]
            if not isinstance(value, Tensor):
                pending.append((name, ["value", str(value)], []))
            elif (first := seen.setdefault(_place(value, name), name)) != name:
                pending.append((name, ["tied to", first], []))
            else:
                pieces = [pool.submit(_piece_digest, value, start, stop) for start, stop in _pieces(value)]
                pending.append((name, [list(value.shape), str(value.dtype)], pieces))
        for name, about, pieces in pending:
            yield _json([name, *about]) + b"".join(piece.result() for piece in pieces)


def _place(tensor: Tensor, name: str) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory."""
    if not tensor.numel():
        return (name,)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(PIECE // tensor.element_size(), 1)
    for start in range(0, tensor.numel(), step):
        yield start, min(start + step, tensor.numel())


@torch.no_grad()
def _piece_digest(tensor: Tensor, start: int, stop: int) -> bytes:
    # A quantised parameter's class would quantise its pieces anew.
    piece = tensor.detach().as_subclass(Tensor).reshape(-1)[start:stop]
    return hashlib.blake2b(piece.cpu().view(torch.uint8).numpy().data, digest_size=16).digest()
