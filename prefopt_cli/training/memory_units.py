"""What of a model is sharded, and in which pieces it is put together for computing."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prefopt_cli.models.quantised import quantised_layers, weight_bytes
from prefopt_cli.recipe.quantization_settings import QuantizationSettings
from prefopt_cli.scoring.forward import plain_model

IN_FLIGHT = 2
"""Layers that are whole at once: the one that computes, and the next one, fetched meanwhile."""


@dataclass(frozen=True)
class ModelBytes:
    """A model's bytes, as every process would hold them alone, and what is put together at once."""

    weights: int
    """Of all parameters and buffers, quantised ones as they are stored."""
    plain_weights: int
    """The same without quantisation, as a trace on the skeleton sees them."""
    trained: int
    """Of the parameters that are trained, and of their gradients."""
    trained_numbers: int
    dequantised: int
    """Of the largest matrix that is brought from 4 bits to its computing type and forgotten again."""
    computed_weights: int
    """Of all parameters in the type that they are computed in."""
    computed_trained: int
    """The same of those that are trained."""
    gathered: int
    """Of what is whole at once where weights are sharded layer by layer, in that type."""
    outside: int
    """Of the largest piece outside the layers; part of `gathered`."""
    whole_gradients: int
    """Of the gradients of the largest of all pieces."""


def model_bytes(
    model: Any, *, low_precision: bool, quantization: QuantizationSettings | None = None
) -> ModelBytes:
    """Count a model.

    Args:
        model: a causal language model or a `PeftModel` around one, on any device, not quantised yet.
        low_precision: whether pieces are put together in 2 bytes per number.
        quantization: how its base will be stored.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buffers = tensor_bytes(model.buffers())
    pieces = _pieces(model)
    outside = max(_computed(piece, low_precision) for piece in pieces.outside)
    layer = max((_computed(piece, low_precision) for piece in pieces.layers), default=0)
    gradients = [_computed((each for each in piece if each.requires_grad), low_precision) for piece in pieces]
    return ModelBytes(
        weights=weight_bytes(model, quantization) + buffers,
        plain_weights=tensor_bytes(parameters) + buffers,
        trained=tensor_bytes(trained),
        trained_numbers=sum(parameter.numel() for parameter in trained),
        dequantised=_largest_dequantised(model, quantization),
        computed_weights=_computed(parameters, low_precision),
        computed_trained=_computed(trained, low_precision),
        gathered=outside + IN_FLIGHT * layer + _computed(pieces.rest, low_precision),
        outside=outside,
        whole_gradients=max(gradients),
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the data of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shard_share(tensors: Iterable[Tensor], processes: int) -> float:
    """The share of tensors that the first of several processes holds: each is cut along its first dimension.

    What does not divide is filled up, so that it is a little more than one of so many parts.
    """
    whole = cut = 0
    for tensor in tensors:
        rows = tensor.shape[0] if tensor.ndim else 1
        size = tensor.numel() * tensor.element_size()
        whole += size
        cut += math.ceil(rows / processes) * size // max(rows, 1)
    return cut / whole if whole else 1 / processes


@dataclass(frozen=True)
class _Pieces:
    """Parameters by the pieces that accelerate shards a model in."""

    layers: list[list[nn.Parameter]]
    outside: list[list[nn.Parameter]]
    """The embedding, and the end of the model with the language-model head; one piece where they are tied."""
    rest: list[nn.Parameter]

    def __iter__(self) -> Any:
        return iter([*self.layers, *self.outside, self.rest])


def _pieces(model: Any) -> _Pieces:
    plain = plain_model(model)
    layers = [list(layer.parameters()) for layer in _layers(plain)]
    taken = {id(parameter) for layer in layers for parameter in layer}
    embedding, head = (
        list(module.parameters()) if module is not None else []
        for module in (plain.get_input_embeddings(), plain.get_output_embeddings())
    )
    tied = {id(each) for each in embedding} & {id(each) for each in head}
    outside = [embedding + head] if tied else [embedding, head]
    outside = [list({id(each): each for each in piece}.values()) for piece in outside]
    taken |= {id(parameter) for piece in outside for parameter in piece}
    return _Pieces(layers, outside, [each for each in model.parameters() if id(each) not in taken])


def _layers(plain: Any) -> list[nn.Module]:
    """The modules that are sharded one by one: those that the model names as not to be split."""
    names = set(getattr(plain, "_no_split_modules", None) or ())
    return [module for module in plain.modules() if type(module).__name__ in names]


def _computed(parameters: Iterable[nn.Parameter], low_precision: bool) -> int:
    """Bytes of parameters in the type that they are computed in."""
    return sum(
        each.numel() * (min(each.element_size(), 2) if low_precision else each.element_size())
        for each in parameters
    )


def _largest_dequantised(model: Any, quantization: QuantizationSettings | None) -> int:
    if quantization is None or quantization.bits != 4:  # 8 bits are multiplied as they are
        return 0
    size = 4 if quantization.compute_dtype == "float32" else 2
    layers: list[Any] = list(quantised_layers(model, quantization).values())
    return size * max((layer.weight.numel() for layer in layers), default=0)
