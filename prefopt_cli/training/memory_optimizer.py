"""What an optimizer keeps between steps and needs during one, in bytes, by its ``optim`` name."""

from collections.abc import Sequence

from torch import Tensor

_BLOCK = 256  # bitsandbytes keeps one float32 scale per block and state
_SMALL = 4096  # ... and leaves smaller tensors in float32


def optimizer_state_bytes(optimizer: str, parameters: Sequence[Tensor]) -> int:
    """Bytes of the states of all trainable parameters from the first step on.

    Paged optimizers are counted in full: their pages leave the GPU only when it is full.
    """
    return sum(_state_bytes(optimizer, parameter) for parameter in parameters)


def optimizer_step_bytes(optimizer: str, parameters: Sequence[Tensor], device: str) -> int:
    """Bytes of the temporaries of one optimizer step, beside parameters, gradients and states."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    if not sizes:
        return 0
    if optimizer == "adamw_torch":
        # CUDA runs all parameters at once and so holds a square root of every second moment; the CPU runs
        # one by one with two temporaries each.
        return sum(sizes) if device == "cuda" else 2 * max(sizes)
    if optimizer == "adafactor":
        return 3 * max(sizes)  # squared gradient, update, and one product, parameter by parameter
    return 0  # fused and in-place kernels


def is_known_optimizer(optimizer: str) -> bool:
    """Whether the states are known; otherwise two states in the parameter's type are assumed."""
    return optimizer == "adafactor" or optimizer.startswith(_QUANTIZED) or optimizer in _FULL_STATES


_FULL_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "sgd": 0,
    "rmsprop": 1,
    "adagrad": 1,
}
_QUANTIZED = ("adamw_", "paged_", "lion_", "ademamix", "rmsprop_bnb")


def _state_bytes(optimizer: str, parameter: Tensor) -> int:
    count = parameter.numel()
    if optimizer == "adafactor":
        return 4 * _factored(parameter)
    if optimizer in _FULL_STATES:
        return _FULL_STATES[optimizer] * count * parameter.element_size()
    if not optimizer.startswith(_QUANTIZED):
        return 2 * count * parameter.element_size()
    states = 1 if "lion" in optimizer or "rmsprop" in optimizer else 3 if "ademamix" in optimizer else 2
    if "4bit" in optimizer and count >= _SMALL:
        return states * (count // 2 + 4 * count // 128)
    if "8bit" in optimizer and count >= _SMALL:
        return states * (count + 4 * count // _BLOCK)
    return states * count * 4


def _factored(parameter: Tensor) -> int:
    """Adafactor keeps the means of rows and of columns instead of a matrix."""
    if parameter.ndim < 2:
        return parameter.numel()
    return parameter.numel() // parameter.size(-1) + parameter.numel() // parameter.size(-2)
