"""What packing and cached reference scores save over TRL's step, predicted from lengths and sizes alone.

Counted are the floating-point operations of matrix products; a training step's time is taken to go with them.
Left out, so that a measured step may differ: everything element by element (normalisation, activation functions,
softmax), embeddings, the loss, the optimizer's step, loading and overheads of every kind (together they weigh most
for small models and small batches), what rounding widths up adds, and how much better a device works at large
products. Long padded rows leave the processor's cache, which makes TRL's step slower than predicted here.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Device = Literal["cpu", "cuda"]

PRODUCT = 2
"""Operations per weight and token: one multiplication, one addition."""


@dataclass(frozen=True)
class ModelWork:
    """What the operations of a model's training step follow from."""

    trained: int
    """Weights of the backbone's linear layers that are trained; every token is taken to use all of them, so a
    mixture of experts is counted as if all its experts ran."""
    frozen: int
    """Those that are not trained: backward needs only the gradient with respect to their inputs."""
    head: int
    """Weights of the language-model head, hidden x vocabulary."""
    head_is_trained: bool
    attention: int
    """Width of a token's queries (heads x their size), over all layers."""
    checkpointing: bool = False
    """Whether backward computes the layers' forward pass again."""


@dataclass(frozen=True)
class Positions:
    """What goes through the model in each of N batches, (N,) each."""

    tokens: np.ndarray
    """Positions of the backbone, padding included."""
    seen: np.ndarray
    """Pairs of a query and a key that attention computes."""
    scored: np.ndarray
    """Positions of the head."""


@dataclass(frozen=True)
class Savings:
    """Means over the batches of an epoch in random order, and the predicted speed-up."""

    batches: int
    rows: int
    """Rows of the data (pairs, or lists of responses) in a batch."""
    padded_tokens: float
    """Positions of a batch of TRL's kind: a row per response, each as long as the batch's longest."""
    padding_share: float
    """Share of them that is padding."""
    packed_tokens: float
    """Tokens of a packed batch: every prompt once, no padding."""
    response_tokens: float
    speedup: float
    """Operations of TRL's step as it comes, with a reference pass in each, as a multiple of those of prefopt's."""
    speedup_precomputed: float
    """The same for TRL with the reference's log-probabilities computed before training."""


def draw_batches(lengths: np.ndarray, batch_size: int, seed: int = 0) -> np.ndarray:
    """The batches of an epoch in random order; the last one is filled up from the first.

    Args:
        lengths: (P, 1 + R) tokens of every row's prompt and of its responses; 0 where it has fewer than R.
        batch_size: rows of a batch; with fewer than that in all, they are one batch.
        seed: of the order.

    Returns:
        (N, B, 1 + R) lengths.
    """
    size = min(batch_size, len(lengths))
    order = np.random.default_rng(seed).permutation(len(lengths))
    return lengths[np.resize(order, (-(-len(order) // size), size))]


def heaviest_batch(batches: np.ndarray, *, packed: bool) -> np.ndarray:
    """(B, 1 + R) the batch with most tokens in the layout; of equal ones that with most response tokens.

    Args:
        batches: (N, B, 1 + R) as `draw_batches` gives them.
        packed: whether the layout is packed.
    """
    tokens = batches.sum((1, 2)) if packed else _longest(batches)
    return batches[np.lexsort((batches[:, :, 1:].sum((1, 2)), tokens))[-1]]


def predict_savings(
    batches: np.ndarray, work: ModelWork, *, packed: bool, cached: bool, device: Device, kept: int = 0
) -> Savings:
    """Compare prefopt's step with TRL's.

    Args:
        batches: (N, B, 1 + R) as `draw_batches` gives them.
        work: the model's sizes.
        packed: whether prefopt's batches are packed; otherwise they are padded like TRL's.
        cached: whether prefopt's reference scores are known before training.
        device: on the CPU TRL's head scores every position of a batch, on CUDA those of the responses.
        kept: positions whose probabilities prefopt's head keeps for backward instead of computing them again.
    """
    trl = padded_positions(batches)
    responses = packed_positions(batches).scored
    ours = packed_positions(batches) if packed else Positions(trl.tokens, trl.seen, responses)
    if device == "cuda":
        trl = Positions(trl.tokens, trl.seen, responses)
    trained = training_operations(work, trl).mean()
    reference = forward_operations(work, trl).mean()
    own = training_operations(work, ours, kept).mean()
    own += 0 if cached else forward_operations(work, ours).mean()
    real = (batches[:, :, 1:] + (batches[:, :, 1:] > 0) * batches[:, :, :1]).sum()
    return Savings(
        batches=len(batches),
        rows=batches.shape[1],
        padded_tokens=float(trl.tokens.mean()),
        padding_share=float(1 - real / trl.tokens.sum()),
        packed_tokens=float(batches.sum((1, 2)).mean()),
        response_tokens=float(responses.mean()),
        speedup=float((trained + reference) / own),
        speedup_precomputed=float(trained / own),
    )


def padded_positions(batches: np.ndarray) -> Positions:
    """A row per response, all as long as the longest; every query meets every key, and the head every position."""
    rows, width = (batches[:, :, 1:] > 0).sum((1, 2)), _longest(batches)
    return Positions(tokens=rows * width, seen=rows * width**2, scored=rows * width)


def packed_positions(batches: np.ndarray) -> Positions:
    """Every prompt once; a query meets the keys that it may see, and the head the responses."""
    prompt, responses = batches[:, :, :1], batches[:, :, 1:]
    seen = _causal(prompt).sum((1, 2)) + (responses * prompt + _causal(responses)).sum((1, 2))
    return Positions(tokens=batches.sum((1, 2)), seen=seen, scored=responses.sum((1, 2)))


def forward_operations(work: ModelWork, positions: Positions) -> np.ndarray:
    """(N,) operations of a forward pass without gradients."""
    return _backbone_forward(work, positions) + PRODUCT * work.head * positions.scored


def training_operations(work: ModelWork, positions: Positions, kept: int = 0) -> np.ndarray:
    """(N,) operations of forward and backward.

    A trained weight costs its forward product twice again in backward, a frozen one once; both products of
    attention twice. The head computes its logits again in backward, except for ``kept`` positions of a batch.
    """
    forward = _backbone_forward(work, positions)
    backward = PRODUCT * (2 * work.trained + work.frozen) * positions.tokens
    backward = backward + 2 * _attention(work, positions)
    again = forward if work.checkpointing else 0
    gradients = (2 if work.head_is_trained else 1) * positions.scored
    logits = positions.scored + np.maximum(positions.scored - kept, 0)
    return forward + again + backward + PRODUCT * work.head * (logits + gradients)


def _backbone_forward(work: ModelWork, positions: Positions) -> np.ndarray:
    return PRODUCT * (work.trained + work.frozen) * positions.tokens + _attention(work, positions)


def _attention(work: ModelWork, positions: Positions) -> np.ndarray:
    """Forward: a product for the scores and one with the values."""
    return 2 * PRODUCT * work.attention * positions.seen


def _longest(batches: np.ndarray) -> np.ndarray:
    """(N,) tokens of the longest prompt + response of each batch."""
    longest: np.ndarray = (batches[:, :, 0] + batches[:, :, 1:].max(2)).max(1)
    return longest


def _causal(lengths: np.ndarray) -> np.ndarray:
    """Pairs of a query and a key among so many tokens in a row."""
    return lengths * (lengths + 1) / 2
