"""One forward pass: from a batch of examples to the score of every response, or of every response token."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefopt_cli.scoring.attention import attention_input
from prefopt_cli.scoring.divergence import HeadStates, TokenDivergence
from prefopt_cli.scoring.head import Pooling, ScoresAndStates, TokenScores

if TYPE_CHECKING:
    from prefopt_cli.scoring.layout import Layout

IGNORED_LABEL = -100


@dataclass(frozen=True)
class ResponseScores:
    """What one forward pass says about K responses; token sums run in float32 or wider."""

    logps: Tensor
    """(K,) summed log-probability of the response tokens, in nats. Carries the gradient."""
    lengths: Tensor
    """(K,) number of response tokens."""
    entropy: Tensor
    """(K,) sum over the response tokens of the policy's entropy, in nats. Detached, as all below."""
    mean_logits: Tensor
    """(K,) sum over the response tokens of the logits' mean over the vocabulary."""
    top1: Tensor
    """(K,) number of response tokens that were the policy's most likely ones."""
    router_loss: Tensor | None = None
    """() load-balancing loss of a mixture-of-experts model that returns one. Carries the gradient."""
    states: Tensor | None = None
    """(K + U, H) last hidden states of all responses of the batch, pooled over their tokens, where they were asked
    for: the K scored ones, then the others. Carries the gradient."""


@dataclass(frozen=True)
class SampleScores:
    """What one forward pass says about the T tokens of K responses, beside a reference; 0 outside the mask.

    All are (K, T), float32 or wider, T being the tokens of the longest response.
    """

    kl: Tensor
    """KL(policy || reference) of the token's distribution over the whole vocabulary, in nats. Carries the gradient."""
    log_probs: Tensor
    """Log-probability of the token under the policy, in nats. Carries the gradient."""
    entropy: Tensor
    """Entropy of the policy where it predicts the token, in nats. Detached."""
    mask: Tensor
    """Boolean: where there is a token."""


def score_responses(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    layout: "Layout",
    *,
    router_logits: bool = False,
    pooling: Pooling | None = None,
) -> ResponseScores:
    """Score the responses of a batch.

    Args:
        model: a causal language model that `Layout.prepare` has seen, under any wrappers.
        batch: as `layout` made it.
        layout: packed or padded.
        router_logits: ask a mixture-of-experts model for its load-balancing loss; padded batches only, and the
            model must be a TRL trainer's, whose head adds that loss up.
        pooling: return the responses' hidden states too, pooled so; not together with `router_logits`.
    """
    if router_logits:
        return _with_router_loss(model, batch)
    inputs = {**_inputs(batch, layout), "targets": batch["targets"]}
    if pooling is None:
        scores: TokenScores = model(**inputs)
        return _summed(scores, batch["slots"])
    both: ScoresAndStates = model(**inputs, passages=batch["passages"], pooling=pooling)
    return replace(_summed(both.scores, batch["slots"]), states=both.states)


def reference_states(model: nn.Module, batch: Mapping[str, Tensor], layout: "Layout") -> HeadStates:
    """What a frozen policy makes its predictions of a batch's response tokens from, for `score_samples`.

    Args:
        model: as for `score_responses`; the caller selects the adapter, or switches it off. Runs without dropout,
            gradient checkpointing and gradients, and is left in the mode that it was in.
        batch: as `layout` made it.
        layout: packed or padded.
    """
    with at_rest(model):
        states: HeadStates = model(**_inputs(batch, layout), states_only=True)
    return states


def score_samples(
    model: nn.Module, batch: Mapping[str, Tensor], layout: "Layout", reference: HeadStates
) -> SampleScores:
    """Compare the policy with a reference at every response token of a batch.

    Args:
        model: as for `score_responses`.
        batch: as `layout` made it.
        layout: packed or padded.
        reference: `reference_states` of the same batch.

    Raises:
        ValueError: the reference is of other positions or of another vocabulary.
    """
    scores: TokenDivergence = model(**_inputs(batch, layout), targets=batch["targets"], reference=reference)
    slots = batch["slots"]
    return SampleScores(
        kl=_per_token(scores.kl, slots),
        log_probs=_per_token(scores.log_probs, slots),
        entropy=_per_token(scores.entropy, slots),
        mask=slots < scores.kl.size(0),
    )


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        # An autocast around this may have kept casts of weights, which lead no gradient back to them.
        torch.clear_autocast_cache()


def _inputs(batch: Mapping[str, Tensor], layout: "Layout") -> dict[str, Any]:
    """What a model gets of a batch, but for the targets."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "predicting")}
    if layout.way is None:
        inputs["attention_mask"] = batch["attention_mask"]
    else:
        inputs["attention_mask"] = attention_input(layout.way, batch, layout.mask_dtype)
        inputs["position_ids"] = batch["position_ids"]
    return inputs


def _per_token(values: Tensor, slots: Tensor) -> Tensor:
    """(K, T) values (N,) of the response tokens, in float32 or wider, and 0 where a response has no more."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.cat((wide, wide.new_zeros(1)))[slots]


def _summed(scores: TokenScores, slots: Tensor, router_loss: Tensor | None = None) -> ResponseScores:
    def per_response(values: Tensor) -> Tensor:
        return _per_token(values, slots).sum(dim=1)

    return ResponseScores(
        logps=per_response(scores.log_probs),
        lengths=(slots < scores.log_probs.size(0)).sum(dim=1),
        entropy=per_response(scores.entropy),
        mean_logits=per_response(scores.mean_logits),
        top1=per_response(scores.is_top1),
        router_loss=router_loss,
    )


def _with_router_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> ResponseScores:
    """Through TRL's head (`fused_lm_head=True`), which knows how each family adds its experts' loss up."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED_LABEL)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**inputs, output_router_logits=True, labels=labels, fused_lm_head=True, use_cache=False)
    # Position t scores token t + 1, so the last position of a row scores nothing.
    width = batch["input_ids"].size(1) - 1
    places = batch["predicting"]
    places = places - places // (width + 1)

    def at_responses(values: Tensor) -> Tensor:
        return values[:, -width:].reshape(-1)[places]

    scores = TokenScores(
        at_responses(outputs.log_probs),
        at_responses(outputs.entropy.detach()),
        at_responses(outputs.mean_logits.detach()),
        at_responses(outputs.is_top1.detach()),
    )
    return _summed(scores, batch["slots"], outputs.aux_loss)


def plain_model(model: Any) -> Any:
    """The transformers model inside peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
