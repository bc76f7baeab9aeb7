"""The language-model head on response positions only, in chunks: log-probabilities without the logits.

Where Triton runs (CUDA), TRL's kernel does it. Elsewhere TRL's head would score every position of the batch and
hold several copies of a tile of 4096 x 32768 logits; the function here works in chunks that stay in the cache.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.scoring.chunks import HeadGradients, Numerics, slices
from prefopt_cli.scoring.divergence import HeadStates, kept_states, token_divergence

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


Pooling = Literal["last", "mean"]
"""The state that stands for a response: that of its last token, or the mean over its tokens."""


class ScoresAndStates(NamedTuple):
    """What the model says about N response tokens, and what it made of P responses."""

    scores: TokenScores
    states: Tensor
    """(P, H) last hidden state of each response, pooled over its tokens; carries a gradient."""


def add_response_head(model: Any) -> None:
    """Let a model say something about some positions instead of returning logits.

    - ``model(..., predicting=, targets=)`` returns `TokenScores`;
    - ``model(..., predicting=, targets=, passages=, pooling=)`` returns `ScoresAndStates`: ``passages`` (P, 2) are the
      first places of responses and their numbers of tokens, ``pooling`` is `last` or `mean`;
    - ``model(..., predicting=, states_only=True)`` returns the `HeadStates` there: the head is the one that is active
      now, so with peft's adapter off the original one;
    - ``model(..., predicting=, targets=, reference=)`` returns the `TokenDivergence` from such states of another model.

    ``predicting`` (N,) are places in the flattened (rows x width) outputs of the backbone, ``targets`` (N,) the
    tokens to score there.

    Args:
        model: a causal language model of transformers, not wrapped by peft. Called without ``predicting``
            it is what it was. A second call does nothing.

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
    def forward(
        self: Any,
        *args: Any,
        predicting: Any = None,
        targets: Any = None,
        reference: HeadStates | None = None,
        states_only: bool = False,
        passages: Any = None,
        pooling: Pooling = "last",
        **kwargs: Any,
    ) -> Any:
        if predicting is None:
            return plain(self, *args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        hidden = self.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state
        responses = hidden.flatten(0, 1).index_select(0, predicting)
        # Where peft keeps several heads, these are attributes of the one that is active now.
        head = self.get_output_embeddings()

        def at_head(responses: Tensor) -> Any:
            weight, bias = head.weight, head.bias
            with maybe_gather_lm_head_ctx(*(p for p in (weight, bias) if p is not None)):
                if states_only:
                    sharded = any(isinstance(each, FSDPModule) for each in (self, head))
                    return kept_states(responses, weight, bias, sharded=sharded or hasattr(weight, "ds_id"))
                if reference is not None:
                    return token_divergence(
                        responses, weight, targets, reference, bias, scale=scale, softcap=softcap
                    )
                scores = token_scores(responses, weight, targets, bias, scale=scale, softcap=softcap)
                return (
                    scores if passages is None else ScoresAndStates(scores, pooled(hidden, passages, pooling))
                )

        return _in_its_own_call(head, at_head, responses)

    model.forward = types.MethodType(forward, model)
    model.scores_responses = True


def _in_its_own_call(head: Any, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """``function(hidden)``, where FSDP has gathered the head's weights: it does so when the head is called."""
    if not isinstance(head, FSDPModule):
        return function(hidden)
    module: Any = head
    module.forward = function
    try:
        return module(hidden)
    finally:
        del module.forward


def pooled(hidden: Tensor, passages: Tensor, pooling: Pooling) -> Tensor:
    """(P, H) one state per response; a mean is in float32 or wider.

    Args:
        hidden: (R, W, H) outputs of the backbone.
        passages: (P, 2) first place, in the flattened rows, and number of tokens of each response.
        pooling: `last` takes the state of the last token, `mean` the mean over all of them.
    """
    flat = hidden.flatten(0, 1)
    starts, lengths = passages.unbind(1)
    if pooling == "last":
        return flat.index_select(0, starts + lengths - 1)
    places = torch.arange(flat.size(0), device=flat.device)
    inside = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    wide = torch.promote_types(flat.dtype, torch.float32)
    # What lies outside of all responses would be multiplied by zero, and a nan is a nan all the same.
    own = torch.where(inside.any(0)[:, None], flat, 0).to(wide)
    with torch.autocast(flat.device.type, enabled=False):  # it would round the product, or overflow
        # A product sums in the same order every time, which adding by index does not on CUDA.
        means: Tensor = inside.to(wide) @ own / lengths[:, None]
    return means


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
        ctx.numerics = numerics = Numerics.here(hidden, scale, softcap)
        count, vocabulary, wide = hidden.size(0), weight.size(0), numerics.wide
        scores = hidden.new_empty((4, count), dtype=wide)
        log_z = hidden.new_empty(count, dtype=wide)
        ctx.kept = {}
        room = KEPT_BYTES if any(ctx.needs_input_grad) else 0
        for rows in _chunks(count, vocabulary):
            logits = numerics.logits(hidden[rows], weight, bias)
            wanted = targets[rows, None]
            target = logits.gather(1, wanted)
            scores[2, rows] = logits.mean(1)
            scores[3, rows] = _is_first_maximum(logits, target, wanted)
            log_probs = torch.log_softmax(logits, 1)
            scores[0, rows] = log_probs.gather(1, wanted)[:, 0]
            log_z[rows] = target[:, 0] - scores[0, rows]
            probabilities = torch.exp(log_probs, out=logits)
            with torch.autocast(hidden.device.type, enabled=False):  # it would round both to bfloat16
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
        head = weight.to(ctx.numerics.dtype)
        sums = HeadGradients(hidden, weight, bias, head, ctx.needs_input_grad[:3])
        for rows in _chunks(hidden.size(0), weight.size(0)):
            sums.add(rows, _logits_gradient(ctx, rows, hidden, head, bias, targets, log_z, gradient))
        return *sums.totals(), None, None, None


def _logits_gradient(
    ctx: Any,
    rows: slice,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_z: Tensor,
    gradient: Tensor,
) -> Tensor:
    """(n, V) gradient with respect to the products of hidden and weight."""
    probabilities = ctx.kept.pop(rows.start, None)
    slope = None
    if probabilities is None:
        probabilities = ctx.numerics.logits(hidden[rows], head, bias)
        slope = ctx.numerics.slope(probabilities)
        probabilities.sub_(log_z[rows, None]).exp_()
    factors = gradient[rows].to(log_z.dtype) * ctx.numerics.scale
    by_logits = probabilities.mul_(-factors[:, None])
    by_logits.scatter_add_(1, targets[rows, None], factors[:, None])
    return by_logits if slope is None else by_logits.mul_(slope)


def _is_first_maximum(logits: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    """(n,) whether the target's logit is the largest; of equal ones the first token counts, as in argmax."""
    best = target[:, 0] >= logits.amax(1)
    candidates = best.nonzero()[:, 0]
    best[candidates] = logits[candidates].argmax(1) == wanted[candidates, 0]
    return best


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    return slices(count, max(CHUNK_ELEMENTS // vocabulary, CHUNK_ROWS))


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
