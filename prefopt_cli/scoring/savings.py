"""What packing and cached reference scores save over TRL's step, predicted from lengths and sizes alone.

Counted are the floating-point operations of matrix products; a training step's time is taken to go with them.
Left out, so that a measured step may differ: everything element by element (normalisation, activation functions,
softmax), embeddings, the loss, the optimizer's step, loading and overheads of every kind (together they weigh most
for small models and small batches), what rounding widths up adds, and how much better a device works at large
products. Long padded rows leave the processor's cache, which makes TRL's step slower than predicted here.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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


class Unscored(NamedTuple):
    """Texts that are read after a row's prompt but not scored, by row; may be what is to be expected of draws."""

    texts: np.ndarray
    """How many."""
    tokens: np.ndarray
    """Their tokens in all."""
    pairs: np.ndarray
    """Pairs of a query and a key that lie in the same of these texts."""


NO_TEXTS = Unscored(*np.zeros((3, 1, 1), dtype=np.int64))


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
    """Positions of a batch of TRL's kind: a row per response (and text that is not scored), each as long as the
    batch's longest."""
    padding_share: float
    """Share of them that is padding."""
    packed_tokens: float
    """Tokens of a packed batch: every prompt once, no padding."""
    response_tokens: float
    """Those that are scored."""
    unscored_tokens: float | None
    """Tokens of texts that are read but not scored; None where the method has none of them."""
    speedup: float
    """Operations of TRL's step as it comes, with a reference pass in each, as a multiple of those of prefopt's. TRL
    reads no texts that are not scored: with them it is prefopt's own step on padded rows."""
    speedup_precomputed: float
    """The same for TRL with the reference's log-probabilities computed before training."""
    unscored_cost: float | None
    """What those texts add to the operations of prefopt's step, as a share of the step without them."""


def draw_batches(lengths: np.ndarray, batch_size: int, seed: int = 0) -> np.ndarray:
    """The batches of an epoch in random order; the last one is filled up from the first.

    Args:
        lengths: (P, 1 + R) tokens of every row's prompt and of its responses; 0 where it has fewer than R. Other
            figures of P rows, (P, ...), come in the same order.
        batch_size: rows of a batch; with fewer than that in all, they are one batch.
        seed: of the order.

    Returns:
        (N, B, 1 + R) lengths, or (N, B, ...).
    """
    size = min(batch_size, len(lengths))
    order = np.random.default_rng(seed).permutation(len(lengths))
    return lengths[np.resize(order, (-(-len(order) // size), size))]


def heaviest_batch(batches: np.ndarray, *, packed: bool) -> np.ndarray:
    """(B, 1 + R) the batch with most tokens in the layout; of equal ones that with most response tokens.

    Args:
        batches: (N, B, 1 + R) as `draw_batches` gives them; texts that are not scored count as responses here.
        packed: whether the layout is packed.
    """
    tokens = (packed_positions if packed else padded_positions)(batches).tokens
    return batches[np.lexsort((batches[:, :, 1:].sum((1, 2)), tokens))[-1]]


def predict_savings(
    batches: np.ndarray,
    work: ModelWork,
    *,
    packed: bool,
    cached: bool,
    device: Device,
    kept: int = 0,
    unscored: Unscored | None = None,
) -> Savings:
    """Compare prefopt's step with TRL's; where texts are read that are not scored, with its own on padded rows.

    Args:
        batches: (N, B, 1 + R) as `draw_batches` gives them.
        work: the model's sizes.
        packed: whether prefopt's batches are packed; otherwise they are padded like TRL's.
        cached: whether prefopt's reference scores are known before training.
        device: on the CPU TRL's head scores every position of a batch, on CUDA those of the responses.
        kept: positions whose probabilities prefopt's head keeps for backward instead of computing them again.
        unscored: the texts that are not scored, (N, B) each, all shorter than a response of their row.
    """
    texts = unscored or NO_TEXTS
    padded = padded_positions(batches, texts)
    responses = packed_positions(batches).scored
    same_rows = replace(padded, scored=responses)
    own = _own_operations(work, packed_positions(batches, texts) if packed else same_rows, kept, cached)
    if unscored is None:
        trl = same_rows if device == "cuda" else padded
        compared = training_operations(work, trl).mean()
        reference = forward_operations(work, trl).mean()
        alone = own
    else:
        compared, reference = _own_operations(work, same_rows, kept, cached), 0
        without = (
            packed_positions(batches) if packed else replace(padded_positions(batches), scored=responses)
        )
        alone = _own_operations(work, without, kept, cached)
    real = (batches[:, :, 1:] + (batches[:, :, 1:] > 0) * batches[:, :, :1]).sum()
    real = real + (texts.tokens + texts.texts * batches[:, :, 0]).sum()
    return Savings(
        batches=len(batches),
        rows=batches.shape[1],
        padded_tokens=float(padded.tokens.mean()),
        padding_share=float(1 - real / padded.tokens.sum()),
        packed_tokens=float(packed_positions(batches, texts).tokens.mean()),
        response_tokens=float(responses.mean()),
        unscored_tokens=None if unscored is None else float(unscored.tokens.sum(1).mean()),
        speedup=float((compared + reference) / own),
        speedup_precomputed=float(compared / own),
        unscored_cost=None if unscored is None else float(own / alone - 1),
    )


def _own_operations(work: ModelWork, positions: Positions, kept: int, cached: bool) -> float:
    """Mean operations of prefopt's step; a reference that is not cached reads the whole batch."""
    own = training_operations(work, positions, kept).mean()
    own += 0 if cached else forward_operations(work, positions).mean()
    return float(own)


def padded_positions(batches: np.ndarray, unscored: Unscored = NO_TEXTS) -> Positions:
    """A row per response, all as long as the longest; every query meets every key, and the head every position."""
    rows = (batches[:, :, 1:] > 0).sum((1, 2)) + unscored.texts.sum(1)
    width = _longest(batches)
    return Positions(tokens=rows * width, seen=rows * width**2, scored=rows * width)


def packed_positions(batches: np.ndarray, unscored: Unscored = NO_TEXTS) -> Positions:
    """Every prompt once; a query meets the keys that it may see, and the head the responses."""
    prompt, responses = batches[:, :, :1], batches[:, :, 1:]
    seen = _causal(prompt).sum((1, 2)) + (responses * prompt + _causal(responses)).sum((1, 2))
    seen = seen + (unscored.tokens * batches[:, :, 0] + unscored.pairs).sum(1)
    tokens = batches.sum((1, 2)) + unscored.tokens.sum(1)
    return Positions(tokens=tokens, seen=seen, scored=responses.sum((1, 2)))


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
