"""One forward pass: from a padded batch of pairs to the score of every response.

The language-model head runs through TRL's fused head (``model(..., fused_lm_head=True)``), which returns
per-token log-probabilities and statistics without building the batch x length x vocabulary logits. This is
the one place that knows of it; `tests/invariants/test_trl_contract.py` fails when TRL changes it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100

MODEL_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class ResponseScores:
    """What one forward pass says about R responses; token sums run in float32 or wider."""

    logps: Tensor
    """(R,) summed log-probability of the response tokens, in nats. Carries the gradient."""
    lengths: Tensor
    """(R,) number of response tokens."""
    entropy: Tensor
    """(R,) sum over the response tokens of the policy's entropy, in nats. Detached, as all below."""
    mean_logits: Tensor
    """(R,) sum over the response tokens of the logits' mean over the vocabulary."""
    top1: Tensor
    """(R,) number of response tokens that were the policy's most likely ones."""
    router_loss: Tensor | None = None
    """() load-balancing loss of a mixture-of-experts model that returns one. Carries the gradient."""


def score_responses(
    model: nn.Module, batch: Mapping[str, Tensor], *, router_logits: bool = False
) -> ResponseScores:
    """Score the responses of a padded batch.

    Args:
        model: a causal language model that a TRL trainer has prepared (see `with_fused_head`).
        batch: `input_ids`, `attention_mask`, `completion_mask`, each (R, T).
        router_logits: ask a mixture-of-experts model for its load-balancing loss.
    """
    mask = batch["completion_mask"]
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED_LABEL)
    extra = {"output_router_logits": True} if router_logits else {}
    outputs = model(**inputs, **extra, labels=labels, fused_lm_head=True, use_cache=False)
    # Position t scores token t + 1, so the first token of a row has no score.
    width = mask.size(1) - 1
    responses = mask[:, 1:].bool()

    def per_response(values: Tensor) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        return (values[:, -width:].to(wide) * responses).sum(dim=1)

    return ResponseScores(
        logps=per_response(outputs.log_probs),
        lengths=responses.sum(dim=1),
        entropy=per_response(outputs.entropy.detach()),
        mean_logits=per_response(outputs.mean_logits.detach()),
        top1=per_response(outputs.is_top1.detach()),
        router_loss=outputs.aux_loss if router_logits else None,
    )


def with_fused_head(model: nn.Module) -> nn.Module:
    """Prepare a plain model for `score_responses` outside a trainer (a trainer prepares its own)."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


@torch.no_grad()
def score_pairs(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected log-probabilities and lengths of a whole set, in its order.

    Args:
        model: prepared by `with_fused_head`, in eval mode.
        batches: padded batches whose first half of rows are chosen, second half rejected.

    Returns:
        Four (N,) tensors on the CPU: chosen and rejected log-probabilities (nats), their lengths (tokens).
    """
    columns: list[list[Tensor]] = [[], [], [], []]
    for batch in batches:
        scores = score_responses(model, batch)
        parts = (*scores.logps.chunk(2), *scores.lengths.chunk(2))
        for column, part in zip(columns, parts, strict=True):
            column.append(part.cpu())
    chosen, rejected, chosen_lengths, rejected_lengths = (torch.cat(column) for column in columns)
    return chosen, rejected, chosen_lengths, rejected_lengths
