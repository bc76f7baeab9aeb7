"""The language-model head on response positions only, in chunks: log-probabilities without the logits.

Where Triton runs (CUDA), TRL's kernel does it. Elsewhere TRL's head would score every position of the batch and
hold several copies of a tile of 4096 x 32768 logits; the function here works in chunks that stay in the cache.
"""

import functools
import types
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from prefopt_cli.errors import PrefoptError, UserError

CHUNK_ELEMENTS = 2**21
"""Logits in a chunk: 8 MiB in float32, so that its passes find it in the processor's cache."""

CHUNK_ROWS = 128
"""Tokens in a chunk at least, however large the vocabulary: every chunk reads the whole head once."""

KEPT_BYTES = 64 * 2**20
"""Probabilities kept for backward, which spares their recomputation; what goes beyond is computed again."""

TRL_CHUNK = 32768
_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class TokenScores(NamedTuple):
    """What the head says about N tokens, each (N,) and float32 or wider; only `log_probs` carries a gradient."""

    log_probs: Tensor
    """Log-probability of the target, in nats."""
    entropy: Tensor
    """Entropy of the distribution that the target was scored under, in nats."""
    mean_logits: Tensor
    """Mean of the logits over the vocabulary."""
    is_top1: Tensor
    """1 where the target was the most likely token (the first of equally likely ones), else 0."""


def add_response_head(model: Any) -> None:
    """Let ``model(..., predicting=, targets=)`` return the `TokenScores` of these positions instead of logits.

    Args:
        model: a causal language model of transformers, not wrapped by peft. Called without the two arguments
            it is what it was. A second call does nothing.

    ``predicting`` (N,) are places in the flattened (rows x width) outputs of the backbone, ``targets`` (N,) the
    tokens to score there.

    Raises:
        UserError: the head carries an adapter.
        PrefoptError: there is no backbone apart from the head.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "The adapter changes the language-model head by a low-rank sum, which is neither scored nor trained."
        )
    if hasattr(model, "scores_responses"):
        return
    if model.base_model is model:
        raise PrefoptError(
            f"{type(model).__name__} is not split into a backbone and a head that prefopt could find."
        )
    # Not the bound method: a deep copy of the model must run its own.
    plain = model.forward.__func__
    scale, softcap = _logit_transform(model.config)

    # The signature stays: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, predicting: Any = None, targets: Any = None, **kwargs: Any) -> Any:
        if predicting is None:
            return plain(self, *args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        hidden = self.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state
        responses = hidden.flatten(0, 1).index_select(0, predicting)
        head = self.get_output_embeddings()
        with maybe_gather_lm_head_ctx(*(p for p in (head.weight, head.bias) if p is not None)):
            return token_scores(responses, head.weight, targets, head.bias, scale=scale, softcap=softcap)

    model.forward = types.MethodType(forward, model)
    model.scores_responses = True


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """Score N tokens.

    Args:
        hidden: (N, H) outputs of the backbone at the predicting positions.
        weight: (V, H) the head; under autocast the products run in its type.
        targets: (N,) tokens.
        bias: (V,) or None.
        scale: factor of the logits.
        softcap: logits are squeezed to c tanh(logits / c), or not where it is None.
    """
    if hidden.device.type == "cuda":
        scores = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 1.0, TRL_CHUNK, softcap, scale, _OUTPUTS
        )
        log_probs, entropy, _, mean_logits, top1 = scores
        return TokenScores(log_probs, entropy.detach(), mean_logits.detach(), top1.float())
    return TokenScores(*_ChunkedHead.apply(hidden, weight, bias, targets, scale, softcap))


class _ChunkedHead(torch.autograd.Function):
    """d log p(y) / d logits = onehot(y) - p, chunk by chunk; the last probabilities are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.scale, ctx.softcap = scale, softcap
        count, vocabulary = hidden.size(0), weight.size(0)
        wide = torch.promote_types(ctx.dtype, torch.float32)
        scores = hidden.new_empty((4, count), dtype=wide)
        log_z = hidden.new_empty(count, dtype=wide)
        ctx.kept = {}
        room = KEPT_BYTES if any(ctx.needs_input_grad) else 0
        for rows in _chunks(count, vocabulary):
            logits = _logits(ctx, hidden[rows], weight, bias)
            wanted = targets[rows, None]
            target = logits.gather(1, wanted)
            scores[2, rows] = logits.mean(1)
            scores[3, rows] = _is_first_maximum(logits, target, wanted)
            log_probs = torch.log_softmax(logits, 1)
            scores[0, rows] = log_probs.gather(1, wanted)[:, 0]
            log_z[rows] = target[:, 0] - scores[0, rows]
            probabilities = torch.exp(log_probs, out=logits)
            with torch.autocast(device, enabled=False):  # it would round both to bfloat16
                scores[1, rows] = -torch.linalg.vecdot(probabilities, log_probs)
            size = probabilities.numel() * probabilities.element_size()
            if size <= room and softcap is None:
                ctx.kept[rows.start] = probabilities
                room -= size
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        outputs = tuple(scores.unbind(0))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 6
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        for_hidden, for_weight, for_bias = (
            torch.zeros_like(tensor, dtype=log_z.dtype) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        head = weight.to(ctx.dtype)
        for rows in _chunks(hidden.size(0), weight.size(0)):
            by_logits = _logits_gradient(ctx, rows, hidden, weight, bias, targets, log_z, gradient)
            if for_bias is not None:
                for_bias += by_logits.sum(0)
            products = by_logits.to(ctx.dtype)
            if for_hidden is not None:
                for_hidden[rows] = products @ head
            if for_weight is not None:
                for_weight.addmm_(products.t().to(for_weight.dtype), hidden[rows].to(for_weight.dtype))
        sums = zip((for_hidden, for_weight, for_bias), (hidden, weight, bias), strict=True)
        return (
            *(None if total is None else total.to(tensor.dtype) for total, tensor in sums),
            None,
            None,
            None,
        )


def _logits(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, V) transformed logits, in float32 or wider, in memory of their own."""
    logits = hidden.to(ctx.dtype) @ weight.to(ctx.dtype).t()
    if bias is not None:
        logits += bias.to(ctx.dtype)
    logits = logits.to(torch.promote_types(ctx.dtype, torch.float32))
    if ctx.scale != 1.0:
        logits *= ctx.scale
    if ctx.softcap is not None:
        logits.div_(ctx.softcap).tanh_().mul_(ctx.softcap)
    return logits


def _logits_gradient(
    ctx: Any,
    rows: slice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_z: Tensor,
    gradient: Tensor,
) -> Tensor:
    """(n, V) gradient with respect to the products of hidden and weight."""
    probabilities = ctx.kept.pop(rows.start, None)
    slope = None
    if probabilities is None:
        probabilities = _logits(ctx, hidden[rows], weight, bias)
        if ctx.softcap is not None:
            slope = 1 - (probabilities / ctx.softcap).square()
        probabilities.sub_(log_z[rows, None]).exp_()
    factors = gradient[rows].to(log_z.dtype) * ctx.scale
    by_logits = probabilities.mul_(-factors[:, None])
    by_logits.scatter_add_(1, targets[rows, None], factors[:, None])
    return by_logits if slope is None else by_logits.mul_(slope)


def _is_first_maximum(logits: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    """(n,) whether the target's logit is the largest; of equal ones the first token counts, as in argmax."""
    best = target[:, 0] >= logits.amax(1)
    candidates = best.nonzero()[:, 0]
    best[candidates] = logits[candidates].argmax(1) == wanted[candidates, 0]
    return best


def _chunks(count: int, vocabulary: int) -> list[slice]:
    step = max(CHUNK_ELEMENTS // vocabulary, CHUNK_ROWS)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap that a model puts on its logits, by the names its configuration has for them."""
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return float(getattr(text, name)), softcap
    divisor = getattr(text, "logits_scaling", None)
    if divisor is None:
        return 1.0, softcap
    return (float(divisor) if text.model_type == "hyperclovax" else 1 / divisor), softcap
