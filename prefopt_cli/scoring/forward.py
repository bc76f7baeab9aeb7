"""One forward pass: from a batch of examples to the score of every response."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefopt_cli.scoring.attention import attention_input
from prefopt_cli.scoring.head import TokenScores

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


def score_responses(
    model: nn.Module, batch: Mapping[str, Tensor], layout: "Layout", *, router_logits: bool = False
) -> ResponseScores:
    """Score the responses of a batch.

    Args:
        model: a causal language model that `Layout.prepare` has seen, under any wrappers.
        batch: as `layout` made it.
        layout: packed or padded.
        router_logits: ask a mixture-of-experts model for its load-balancing loss; padded batches only, and the
            model must be a TRL trainer's, whose head adds that loss up.
    """
    if router_logits:
        return _with_router_loss(model, batch)
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "predicting", "targets")}
    if layout.way is None:
        inputs["attention_mask"] = batch["attention_mask"]
    else:
        inputs["attention_mask"] = attention_input(layout.way, batch, layout.mask_dtype)
        inputs["position_ids"] = batch["position_ids"]
    scores: TokenScores = model(**inputs)
    return _summed(scores, batch["slots"])


def _summed(scores: TokenScores, slots: Tensor, router_loss: Tensor | None = None) -> ResponseScores:
    def per_response(values: Tensor) -> Tensor:
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.cat((wide, wide.new_zeros(1)))[slots].sum(dim=1)

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
