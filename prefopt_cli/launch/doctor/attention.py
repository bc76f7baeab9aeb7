"""Fast attention: PyTorch's own flash kernels and FlexAttention, and what is installed besides."""

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from prefopt_cli.launch.doctor.finding import Finding, in_brief, note, ok

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values, each (1, 2, width, 64)."""
SLOWER = "leave it: slower kernels take its place (it needs compute capability 8.0 or more)"
PADDED = "or write training.attention_layout: padded"


def attention() -> Iterator[Finding]:
    """Tiny attentions on the device that would train."""
    on_gpu = torch.cuda.is_available()
    yield _tried("attention (sdpa)", _plain, "pip install --upgrade torch")
    if on_gpu:
        yield _tried("PyTorch's flash attention", _flash, SLOWER, "flash kernels")
        yield _tried(
            "FlexAttention, on which packed batches run",
            _flex,
            f"install a C compiler (apt-get install gcc) and triton (pip install triton), {PADDED}",
            "packing",
        )
    yield _flash_attn(on_gpu)


def _tried(name: str, attempt: Callable[[], None], remedy: str, feature: str | None = None) -> Finding:
    try:
        attempt()
    except Exception as error:  # kernels and compilers fail in their own ways
        return note(f"{name} fails: {in_brief(error)}", remedy, feature)
    return ok(f"{name} works", feature)


def _inputs(device: str, dtype: torch.dtype, width: int = 128) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, width, 64, generator=draw).to(device, dtype) for _ in range(3))
    return query, key, value


def _plain() -> None:
    inputs = _inputs("cuda" if torch.cuda.is_available() else "cpu", torch.float32, 16)
    _require_close(scaled_dot_product_attention(*inputs, is_causal=True), inputs)


def _flash() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inputs = _inputs("cuda", torch.float16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        _require_close(scaled_dot_product_attention(*inputs, is_causal=True), inputs)


def _flex() -> None:
    """Compiled, as transformers runs it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    inputs = _inputs("cuda", torch.float16)
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, 128, 128, device="cuda")
    query, key, value = inputs
    found: Any = torch.compile(flex_attention)(query, key, value, block_mask=mask)
    _require_close(found, inputs)


def _require_close(found: torch.Tensor, inputs: Inputs) -> None:
    query, key, value = (tensor.float() for tensor in inputs)
    width = query.size(2)
    scores = query @ key.transpose(-1, -2) / query.size(-1) ** 0.5
    hidden = torch.ones(width, width, dtype=torch.bool, device=query.device).triu(1)
    right = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    if not torch.allclose(found.float(), right, atol=1e-2, rtol=1e-2):
        raise ArithmeticError("its figures are wrong")


def _flash_attn(on_gpu: bool) -> Finding:
    feature = "flash_attention_2"
    try:
        version = metadata.version("flash_attn")
    except metadata.PackageNotFoundError:
        return note(
            "flash-attn is not installed; it is for model.attn_implementation: flash_attention_2",
            "pip install flash-attn --no-build-isolation (after torch; it needs a GPU), or leave the setting out",
            feature,
        )
    try:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

        if on_gpu:
            inputs = tuple(each.transpose(1, 2) for each in _inputs("cuda", torch.float16))
            _require_close(
                flash_attn_func(*inputs, causal=True).transpose(1, 2), _inputs("cuda", torch.float16)
            )
    except Exception as error:
        return note(
            f"flash-attn {version} fails: {in_brief(error)}",
            f"build it for torch {torch.__version__}: pip install --force-reinstall --no-deps "
            "--no-build-isolation flash-attn",
            feature,
        )
    return ok(f"flash-attn {version} " + ("works" if on_gpu else "is installed"), feature)
