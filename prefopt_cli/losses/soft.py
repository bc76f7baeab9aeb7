"""Soft Preference Optimization (Sharifnassab et al., arXiv 2405.00747).

``L = L_pref + kl_coef * KL(pi || pi_ref)``. The preference term has no reference policy in it: it fits
``pi(y|x)^alpha`` to the probability with which a response is preferred, so that under Bradley-Terry
(Plackett-Luce) data with reward r its minimiser is ``softmax(r / alpha)``: alpha is the temperature of the result.
The KL term is taken over responses that the policy itself wrote, not over the preference data.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KLEstimator = Literal["token", "sequence"]
"""What the gradient of `sampled_kl` follows: the policy at the sampled prefixes, or whole responses."""

CHUNK_ELEMENTS = 2**21
"""Logits of a chunk of positions in `position_kls`: 8 MiB in float32 (our choice)."""


def soft_pair_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, alpha: float, weights: Tensor | None = None
) -> Tensor:
    """``-(1/alpha) * mu * log sigma(alpha * Delta)`` with ``Delta = log pi(y_w|x) - log pi(y_l|x)``.

    Args:
        chosen_logps, rejected_logps: (B,) summed log-probabilities under the policy, in nats.
        alpha: exponent of the policy's probabilities, > 0; the result's temperature.
        weights: (B,) mu, for example of `pair_weights`; 1 without them.

    Returns:
        (B,) losses in float32 or the wider type of the inputs.
    """
    chosen, rejected = _wide(chosen_logps, rejected_logps)
    losses = -F.logsigmoid(alpha * (chosen - rejected)) / alpha
    return losses if weights is None else weights * losses


def soft_best_of_n_loss(logps: Tensor, best: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    """``-(1/alpha) * log [ pi(y*)^alpha / sum_i pi(y_i)^alpha ]``: the best of n responses is known.

    Args:
        logps: (B, N) summed log-probabilities under the policy, in nats. Masked entries may hold anything.
        best: (B,) column of the best response, an unmasked one.
        mask: (B, N) true where there is a response; their number may differ from row to row.
        alpha: exponent of the policy's probabilities, > 0.

    Returns:
        (B,) losses in float32 or the wider type of `logps`; 0 where the best response stands alone.
    """
    mask = mask.bool()
    (logps,) = _wide(logps)
    logps = logps.where(mask, 0.0)
    others = mask.scatter(1, best[:, None], False)
    return _not_ahead(logps.gather(1, best[:, None]).squeeze(1), logps, others, alpha)


def soft_ranked_loss(logps: Tensor, ranks: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    """``-(1/alpha) * sum_k log [ pi(y_k)^alpha / sum_j pi(y_j)^alpha ]``, j over y_k itself and all below it.

    Without ties this is the loss of the list y_1 > ... > y_n, whose k-th term runs over j >= k. Responses of equal
    rank form no comparison between themselves, but each is compared with all below them (our choice).

    Args:
        logps: (B, N) summed log-probabilities under the policy, in nats. Masked entries may hold anything.
        ranks: (B, N) 0 for the best, larger is worse, equal ranks tie; only their order counts.
        mask: (B, N) true where there is a response; their number may differ from row to row.
        alpha: exponent of the policy's probabilities, > 0.

    Returns:
        (B,) losses in float32 or the wider type of `logps`; 0 for a row without any comparison.
    """
    mask = mask.bool()
    (logps,) = _wide(logps)
    logps = logps.where(mask, 0.0)
    below = (ranks[:, None, :] > ranks[:, :, None]) & mask[:, None, :] & mask[:, :, None]  # [b, k, j]
    return _not_ahead(logps, logps[:, None, :], below, alpha).sum(dim=1)


def pair_weights(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    gamma: float,
    clamp: float = 5.0,
    mean: Tensor | None = None,
) -> Tensor:
    """mu: less weight for pairs of responses that the policy itself finds poor.

    ``log mu = gamma * (logsumexp(logp_w, logp_l) - its mean over the batch)``, limited to +-clamp. The paper weights
    pairs to this end; the form is our choice. A pair has one weight whichever response won, so weights do
    not move the minimiser under Bradley-Terry data.

    Args:
        chosen_logps, rejected_logps: (B,) log-probabilities under the policy, in nats; divided by the numbers of
            tokens beforehand where lengths are to be normalised.
        gamma: strength; 0 gives 1 everywhere.
        clamp: largest |log mu|.
        mean: () mean of the logsumexp, where the batch is spread over processes; else that of these pairs.

    Returns:
        (B,) weights > 0, detached, in float32 or the wider type of the inputs.
    """
    chosen, rejected = _wide(chosen_logps.detach(), rejected_logps.detach())
    support = torch.logaddexp(chosen, rejected)
    centre = support.mean() if mean is None else mean.detach().to(support)
    return (gamma * (support - centre)).clamp(-clamp, clamp).exp()


def token_kl(policy_logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """``sum_t KL(pi(.|x,y_<t) || pi_ref(.|x,y_<t))`` over the whole vocabulary: `position_kls`, summed.

    Args:
        policy_logits, ref_logits: (B, T, V) logits, of the same shape.
        mask: (B, T) true at the positions that count; elsewhere the logits may hold anything.

    Returns:
        (B,) nats, in float32 or the wider type of the inputs.
    """
    return position_kls(policy_logits, ref_logits, mask).sum(dim=1)


def position_kls(policy_logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(pi(.|x,y_<t) || pi_ref(.|x,y_<t)) over the whole vocabulary, at every position: (B, T) nats.

    Arguments as in `token_kl`; 0 outside the mask. Both passes go through chunks of positions, and backward reads the
    logits again: apart from the gradients there is never a second tensor of their size. Gradients flow to both
    inputs, once (no second derivatives).
    """
    kls: Tensor = _PositionKLs.apply(policy_logits, ref_logits, mask.bool())
    return kls


def sampled_kl(token_kls: Tensor, log_probs: Tensor, mask: Tensor, *, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(pi || pi_ref) from responses drawn from pi itself; its gradient is what `estimator` says.

    Both have the value ``sum_t KL_t``, with KL_t that of the next token after y_<t: its expectation over
    y ~ pi is the KL of whole responses. `token` has the gradient ``sum_t grad KL_t``: low variance, but biased, for
    it ignores that another policy would visit other prefixes. `sequence` adds what ``grad E_y`` brings (the score
    function): ``E[sum_t KL_t * sum_{s<t} grad log pi(y_s)] = E[sum_s grad log pi(y_s) * to_go_s]`` with
    ``to_go_s = sum_{t>s} KL_t``, since KL_t depends on the tokens before t alone. That is unbiased, and stays so when
    a baseline that does not depend on y is taken from to_go_s: the mean of to_go_s over the other responses, 0
    in those that have ended (the baseline is our choice).

    Samples that an earlier policy wrote, or truncated ones (top-k, a temperature), make either gradient approximate.

    Args:
        token_kls: (K, T) KL_t in nats, carrying a gradient, as `position_kls` gives it.
        log_probs: (K, T) log-probabilities of the sampled tokens under the policy, in nats; carry a
            gradient for `sequence`, unused by `token`.
        mask: (K, T) true at response tokens; elsewhere both may hold anything.
        estimator: `token` or `sequence`.

    Returns:
        (K,) nats, in float32 or the wider type of the inputs; their mean is the estimate.

    Raises:
        ValueError: no such estimator.
    """
    if estimator not in ("token", "sequence"):
        raise ValueError(f"estimator is {estimator!r}; it must be 'token' or 'sequence'")
    mask = mask.bool()
    kls, scores = (values.where(mask, 0.0) for values in _wide(token_kls, log_probs))
    value = kls.sum(dim=1)
    if estimator == "token":
        return value
    surrogate = (_advantage(kls.detach()) * scores).sum(dim=1)
    return value + (surrogate - surrogate.detach())  # adds to the gradient, not to the value


def _advantage(kls: Tensor) -> Tensor:
    """(K, T) KL still to come after each token, less its mean over the other responses (0 for one response)."""
    to_go = F.pad(kls, (0, 1))[:, 1:].flip(1).cumsum(dim=1).flip(1)
    return to_go - (to_go.sum(dim=0) - to_go) / max(len(kls) - 1, 1)


def _not_ahead(logps: Tensor, others: Tensor, compared: Tensor, alpha: float) -> Tensor:
    """``-(1/alpha) log [ p^alpha / (p^alpha + sum q^alpha) ]`` for log p (...,) and log q (..., N) of `compared`.

    With one q it is the loss of a pair, to the last digit. Without any it is 0, and so is its gradient. All inputs
    must be finite, those not compared too.
    """
    some = compared.any(dim=-1)
    # Of -inf alone it would have the gradient nan, which no later `where` takes away.
    others = torch.where(compared | ~some[..., None], others, -torch.inf)
    # The largest q comes off before anything else: logsumexp(alpha (q - p)) rounds in p and q far apart, and its own
    # gradient exp(z - result) with it, by up to 0.4 % at z = 1e5 in float32.
    top = others.amax(dim=-1).detach()
    total = (alpha * (others - top[..., None])).exp().sum(dim=-1).log()
    return (-F.logsigmoid(alpha * (logps - top) - total) / alpha).where(some, 0.0)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 or the widest of their types."""
    return [tensor.to(_wide_type(*tensors)) for tensor in tensors]


def _wide_type(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


class _PositionKLs(torch.autograd.Function):
    """d KL / d policy logits = pi * (log pi - log ref - KL); d KL / d reference logits = ref - pi.

    Positions are picked by two indices, not from a flattened view: of logits without their last position
    (``logits[:, :-1]``) that would be a copy of them all.
    """

    @staticmethod
    def forward(ctx: Any, policy_logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
        wide = _wide_type(policy_logits, ref_logits)
        kls = policy_logits.new_zeros(mask.shape, dtype=wide)
        for at in _chunks(mask, policy_logits.size(-1)):
            policy = policy_logits[at].to(wide).log_softmax(dim=-1)
            ratio, probabilities = _ratio(policy, ref_logits[at].to(wide).log_softmax(dim=-1))
            kls[at] = ratio.mul_(probabilities).sum(dim=-1)
        ctx.save_for_backward(policy_logits, ref_logits, mask, kls)
        return kls

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        policy_logits, ref_logits, mask, kls = ctx.saved_tensors
        by_policy, by_ref = (
            torch.zeros_like(logits) if needed else None
            for logits, needed in zip((policy_logits, ref_logits), ctx.needs_input_grad[:2], strict=True)
        )
        for at in _chunks(mask, policy_logits.size(-1)):
            policy = policy_logits[at].to(kls.dtype).log_softmax(dim=-1)
            ref = ref_logits[at].to(kls.dtype).log_softmax(dim=-1)
            ratio, probabilities = _ratio(policy, ref)
            scale = gradient[at][:, None]
            if by_ref is not None:
                by_ref[at] = ref.exp_().sub_(probabilities).mul_(scale).to(by_ref.dtype)
            if by_policy is not None:
                by_logits = ratio.sub_(kls[at][:, None]).mul_(probabilities).mul_(scale)
                by_policy[at] = by_logits.to(by_policy.dtype)
        return by_policy, by_ref, None


def _chunks(mask: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of the true entries of a mask, some of them at a time."""
    step = max(CHUNK_ELEMENTS // vocabulary, 1)
    rows, columns = mask.nonzero(as_tuple=True)
    return list(zip(rows.split(step), columns.split(step), strict=True))


def _ratio(policy: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """log pi - log ref and pi, both (n, V) and new. A token without probability counts for nothing (0 log 0 = 0)."""
    probabilities = policy.exp()
    return (policy - ref).masked_fill_(probabilities == 0, 0.0), probabilities
