"""One training step on fake tensors: every allocation of the real step, and no memory.

A fake tensor has shape, type and device but no data. Model code, autograd, checkpointing, autocast and LoRA
run on it as they are, so no architecture needs a formula of its own. All fakes claim to be on the CPU: a
torch without CUDA cannot run autograd on anything else. Where CUDA differs (TRL's head), this module says so.

One known excess: autograd adds up gradients of fakes out of place where it adds real ones in place, so tied
embeddings seem to need one more gradient of the embedding at the end of backward.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from prefopt_cli.models.memory_log import AllocationLog

Reference = Literal["copy", "adapter_disabled", "none"]
Precision = Literal["no", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]

VOCABULARY_CHUNK = 32768
"""Width of TRL's head tiles (``trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE``; a test compares them)."""

_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepShape:
    """What decides a step's memory besides the model."""

    rows: int
    """Rows of a batch: two per pair."""
    row_length: int
    """Tokens per row, padding included."""
    response_length: int
    """Response tokens per row; CUDA runs the head on these alone."""
    reference: Reference
    mixed_precision: Precision
    gradient_checkpointing: bool
    accumulates: bool
    """Whether gradients of an earlier micro-batch are there already."""
    device: Device


def trace_step(model: nn.Module, shape: StepShape) -> dict[str, int]:
    """Bytes by part at the peak of policy forward, reference forward, loss and backward; no optimizer state.

    The model is left as it is; its weights are neither read nor copied.

    Raises:
        Exception: whatever the model's code raises on tensors without data, for example where it branches on
            their values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    policy = _fake_copy(model, mode)
    frozen = _fake_copy(model, mode) if shape.reference == "copy" else None
    _prepare(policy, shape)
    if frozen is not None:
        frozen.eval()
    log = AllocationLog()
    with warnings.catch_warnings(), mode, log:
        warnings.simplefilter("ignore")
        log.own([*policy.parameters(), *policy.buffers()], "weights")
        if frozen is not None:
            log.own([*frozen.parameters(), *frozen.buffers()], "frozen policy")
        if shape.accumulates:
            for parameter in _trainable(policy):
                parameter.grad = torch.zeros_like(parameter)
        loss = _loss(policy, frozen, shape, log)
        _backward(loss, log)
        log.assign([p.grad for p in _trainable(policy) if p.grad is not None], "gradients")
    return log.peak()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same modules around fake weights. Tied weights stay tied: a deep copy replaces each tensor once."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def _prepare(policy: Any, shape: StepShape) -> None:
    """As the trainer prepares it: training mode, no dropout, checkpointing as asked."""
    policy.train()
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = policy.config
    if str(getattr(config, "_attn_implementation", None)).startswith(("flash", "kernels")):
        # These kernels need a GPU; sdpa never stores the score matrix either.
        config._attn_implementation = "sdpa"
    if shape.gradient_checkpointing:
        # The state of the random generator is data, which fake tensors lack.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if hasattr(policy, "peft_config"):
            policy.enable_input_require_grads()


def _loss(policy: Any, frozen: Any, shape: StepShape, log: AllocationLog) -> Tensor:
    """Policy forward, then reference forward, as TRL orders them: the activations are there during both."""
    tokens = torch.zeros(shape.rows, shape.row_length, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    scores = _score(policy, batch, shape, log)
    if shape.reference != "none":
        log.part = "reference forward"
        with torch.no_grad(), _without_checkpointing(policy):
            reference_scores = _reference_scores(policy, frozen, batch, shape, log)
        log.part = "activations"
        scores = scores - reference_scores
    return scores.mean()


def _reference_scores(
    policy: Any, frozen: Any, batch: dict[str, Tensor], shape: StepShape, log: AllocationLog
) -> Tensor:
    if frozen is not None:
        return _score(frozen, batch, shape, log)
    with policy.disable_adapter():
        return _score(policy, batch, shape, log)


@contextmanager
def _without_checkpointing(policy: nn.Module) -> Iterator[None]:
    policy.eval()  # checkpointing is for training mode; dropout is off anyway
    try:
        yield
    finally:
        policy.train()


def _score(model: Any, batch: dict[str, Tensor], shape: StepShape, log: AllocationLog) -> Tensor:
    """(rows,) summed log-probabilities, the way TRL's fused head computes them."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    part = log.part
    with _autocast(shape):
        hidden = base.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
        head = base.get_output_embeddings()
        targets = batch["input_ids"][:, 1:]
        if shape.device == "cuda":
            positions = max(1, min(shape.response_length, hidden.size(1)))
            hidden, targets = hidden[:, -positions:], targets[:, -positions:]
        if hidden.requires_grad:
            hidden.register_hook(_leaving_head(log))
        log.part = "LM head"
        log_probs = _head(hidden.reshape(-1, hidden.size(-1)), head, targets.reshape(-1), shape)
        log.part = part
    return log_probs.view(targets.shape).sum(dim=1)


def _autocast(shape: StepShape) -> AbstractContextManager[Any]:
    if shape.mixed_precision == "no":
        return nullcontext()
    return torch.autocast("cpu", dtype=_LOW_PRECISION[shape.mixed_precision])


def _head(hidden: Tensor, head: Any, targets: Tensor, shape: StepShape) -> Tensor:
    if shape.device == "cuda":
        return _TritonHead.apply(hidden, head.weight)
    arguments = (1.0, VOCABULARY_CHUNK, None, 1.0, _HEAD_OUTPUTS)
    return ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, targets, *arguments)[0]


def _leaving_head(log: AllocationLog) -> Callable[[Tensor], None]:
    """Backward hook: the gradient has left the head, what is born from now on belongs to the layers."""

    def hook(_: Tensor) -> None:
        log.part = "backward temporaries"

    return hook


def _backward(loss: Tensor, log: AllocationLog) -> None:
    gradient = torch.ones_like(loss)
    log.in_backward, log.part = True, "LM head"
    loss.backward(gradient)
    log.in_backward = False


class _TritonHead(torch.autograd.Function):
    """The allocations of TRL's head where Triton folds each tile in place (CUDA), without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight)
        ctx.compute_dtype = low
        _tiles(hidden, weight, low)
        return hidden.new_zeros(hidden.size(0), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = tensors = ctx.saved_tensors
        sums = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip(tensors, ctx.needs_input_grad, strict=True)
        ]
        _tiles(hidden, weight, ctx.compute_dtype)
        by_hidden, by_weight = (
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, tensors, strict=True)
        )
        return by_hidden, by_weight


def _tiles(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """One tile of logits beside one chunk of the cast inputs; the loop over further tiles reuses them."""
    tokens, vocabulary = min(hidden.size(0), TOKEN_CHUNK_SIZE), min(weight.size(0), VOCABULARY_CHUNK)
    tile = hidden.new_empty(tokens, VOCABULARY_CHUNK, dtype=dtype)
    hidden_chunk, weight_chunk = hidden[:tokens].to(dtype), weight[:vocabulary].to(dtype)
    del tile, hidden_chunk, weight_chunk
