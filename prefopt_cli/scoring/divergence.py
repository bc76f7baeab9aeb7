"""KL divergence of the policy to a frozen reference at every position, over the whole vocabulary, in chunks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt_cli.scoring.chunks import HeadGradients, Numerics, slices

CHUNK_ELEMENTS = 2**20
"""Logits in a chunk of either policy: half of the head's, as two are held side by side."""

CHUNK_ROWS = 64
"""Tokens in a chunk at least, however large the vocabulary: every chunk reads both heads once."""


@dataclass(frozen=True)
class HeadStates:
    """What the head of a model makes the logits of M positions from.

    No tuple, as accelerate would turn the tensors of one into float32: with a head of bfloat16 into a large copy.
    """

    hidden: Tensor
    """(M, H) outputs of the backbone."""
    weight: Tensor
    """(V, H) the head itself, not a copy unless the model is sharded."""
    bias: Tensor | None
    """(V,) or None."""


def kept_states(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, sharded: bool) -> HeadStates:
    """States that outlast the forward pass: of a sharded model the head is only lent to it, so it is copied."""
    if sharded:
        weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    return HeadStates(hidden, weight, bias)


class TokenDivergence(NamedTuple):
    """Policy and reference at M positions, each (M,) and float32 or wider."""

    kl: Tensor
    """KL(policy || reference) of the next token, in nats. Carries the gradient of the policy."""
    log_probs: Tensor
    """Log-probability of the target under the policy, in nats. Carries the gradient."""
    entropy: Tensor
    """Entropy of the policy's next token, in nats. Detached."""


def token_divergence(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reference: HeadStates,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenDivergence:
    """Compare the policy's next-token distributions with those of a frozen reference.

    KL = Σ_v p_v (log p_v - log q_v) over the vocabulary. No more than a chunk of logits of either is ever in memory,
    on any device; backward computes them again. Nothing depends on the data but the values.

    Args:
        hidden: (M, H) outputs of the policy's backbone at the predicting positions.
        weight: (V, H) the policy's head; under autocast the products of both run in its type.
        targets: (M,) tokens.
        reference: of the same positions; gets no gradient. Its hidden states may have another width.
        bias: (V,) or None.
        scale: factor of the logits of both.
        softcap: logits of both are squeezed to c tanh(logits / c), or not where it is None.

    Raises:
        ValueError: the reference is of other positions or of another vocabulary.
    """
    if (reference.hidden.size(0), reference.weight.size(0)) != (hidden.size(0), weight.size(0)):
        raise ValueError(
            f"The policy has {hidden.size(0)} positions and {weight.size(0)} tokens, "
            f"the reference {reference.hidden.size(0)} and {reference.weight.size(0)}."
        )
    # A head that both have is cast once.
    other = None if reference.weight is weight else reference.weight
    numerics = Numerics.here(hidden, scale, softcap)
    return TokenDivergence(
        *_ChunkedDivergence.apply(
            hidden, weight, bias, targets, reference.hidden, other, reference.bias, numerics
        )
    )


class _ChunkedDivergence(torch.autograd.Function):
    """d KL / d logits = p (log p - log q - KL), d log p(y) / d logits = onehot(y) - p; computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        other_hidden: Tensor,
        other_weight: Tensor | None,
        other_bias: Tensor | None,
        numerics: Numerics,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.numerics = numerics
        scores = hidden.new_empty((3, hidden.size(0)), dtype=numerics.wide)
        log_z = hidden.new_empty((2, hidden.size(0)), dtype=numerics.wide)
        heads = _heads(weight, other_weight, numerics.dtype)
        for rows in _chunks(hidden.size(0), weight.size(0)):
            wanted = targets[rows, None]
            log_p, scores[1, rows], log_z[0, rows] = _log_softmax(
                numerics.logits(hidden[rows], heads[0], bias), wanted
            )
            log_q, _, log_z[1, rows] = _log_softmax(
                numerics.logits(other_hidden[rows], heads[1], other_bias), wanted
            )
            scores[0, rows], scores[2, rows] = _kl_and_entropy(log_p, log_q)
            del log_p, log_q  # before the next chunk's are made
        kl, log_probs, entropy = scores.unbind(0)
        ctx.save_for_backward(
            hidden, weight, bias, targets, other_hidden, other_weight, other_bias, log_z, kl.clone()
        )
        ctx.mark_non_differentiable(entropy)
        return kl, log_probs, entropy

    @staticmethod
    def backward(
        ctx: Any, by_kl: Tensor | None, by_log_probs: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        if by_kl is None and by_log_probs is None:
            return (None,) * 8
        hidden, weight, bias, targets, other_hidden, other_weight, other_bias, log_z, kl = ctx.saved_tensors
        numerics: Numerics = ctx.numerics
        heads = _heads(weight, other_weight, numerics.dtype)
        sums = HeadGradients(hidden, weight, bias, heads[0], ctx.needs_input_grad[:3])
        towards = numerics.scale * (torch.zeros_like(kl) if by_log_probs is None else by_log_probs)
        for rows in _chunks(hidden.size(0), weight.size(0)):
            log_p = numerics.logits(hidden[rows], heads[0], bias)
            slope = numerics.slope(log_p)
            log_p -= log_z[0, rows, None]
            factors = -towards[rows, None]
            if by_kl is not None:  # else the reference does not matter
                log_q = numerics.logits(other_hidden[rows], heads[1], other_bias).sub_(log_z[1, rows, None])
                factors = (
                    _log_ratio(log_p, log_q)
                    .sub_(kl[rows, None])
                    .mul_(numerics.scale * by_kl[rows, None])
                    .add_(factors)
                )
                del log_q
            by_logits = log_p.exp_().mul_(factors)
            by_logits.scatter_add_(1, targets[rows, None], towards[rows, None])
            sums.add(rows, by_logits if slope is None else by_logits.mul_(slope))
            del log_p, factors, by_logits, slope  # before the next chunk's are made
        return *sums.totals(), None, None, None, None, None


def _kl_and_entropy(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) each; both log-probabilities (n, V) are used up, so that no more than three such tensors are alive."""
    probabilities = log_p.exp()
    kl = _log_ratio(log_p, log_q).mul_(probabilities).sum(1)
    return kl, -log_p.mul_(probabilities).sum(1)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q, in place of log q."""
    return torch.sub(log_p, log_q, out=log_q)


def _heads(weight: Tensor, other: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both heads in the type of the products."""
    head = weight.to(dtype)
    return head, head if other is None else other.to(dtype)


def _log_softmax(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, V) log-probabilities, and (n,) that of the wanted token and the logarithm of the normaliser."""
    log_probs = torch.log_softmax(logits, 1)
    found = log_probs.gather(1, wanted)[:, 0]
    return log_probs, found, logits.gather(1, wanted)[:, 0] - found


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    return slices(count, max(CHUNK_ELEMENTS // vocabulary, CHUNK_ROWS))
