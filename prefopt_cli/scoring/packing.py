"""Where the tokens of a batch go: one prompt and all its responses are one segment, segments share rows.

    row   | prompt 0 | chosen 0 | rejected 0 | prompt 1 | chosen 1 | rejected 1 | padding |
    position 0 .. P-1   P ..       P ..         0 ..

A response sees its prompt and itself; its positions go on where the prompt's end. `docs/packing.md` has a picture.
Nothing here knows of a model; `attention` turns the layout into what a model's attention takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Example:
    """One prompt and the responses to it that go through the model together."""

    prompt: TokenIds
    responses: Sequence[TokenIds]
    unscored: Sequence[TokenIds] = ()
    """More responses, whose hidden states are wanted but not their log-probabilities."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the model: the prompt once, every response once."""
        return len(self.prompt) + sum(map(len, self.responses)) + sum(map(len, self.unscored))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + response."""
        return len(self.prompt) + max(map(len, [*self.responses, *self.unscored]))


@dataclass(frozen=True)
class Packed:
    """A batch of R rows of W tokens with N response tokens to score, in K responses. All arrays are int64.

    Responses are counted through in response-major order: the first responses of all examples, then the second
    ones of those that have two, and so on. The first token of a response without a prompt is not scored, as
    nothing predicts it.
    """

    input_ids: np.ndarray
    """(R, W) tokens; what is left over at the end of a row is filled with the padding id."""
    position_ids: np.ndarray
    """(R, W) position of each token in its own prompt + response; 0 in padding, as any model has that one."""
    segments: np.ndarray
    """(R, W) number of the segment within the row, rising from 0; padding is the last one."""
    branches: np.ndarray
    """(R, W) 0 in a prompt, 1, 2, ... in its responses."""
    predicting: np.ndarray
    """(N,) place, in the flattened rows, of the token whose output predicts the scored token."""
    targets: np.ndarray
    """(N,) scored tokens."""
    slots: np.ndarray
    """(K, longest) for each response its places among the N tokens; N itself where it has no more."""
    passages: np.ndarray
    """(K + U, 2) first place, in the flattened rows, and number of tokens of each response: the scored ones in
    their order, then the unscored ones, example by example."""
    calls: np.ndarray
    """(C, 4) pieces of attention that together are the whole, for one row without padding: a run of queries
    (start, length) sees itself causally, and before it a run of keys (start, length); see `attention`."""
    tokens: int
    """Tokens in the rows without padding."""


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Segments into rows of at most ``capacity`` tokens: the longest first, each into the first row with room.

    Args:
        lengths: tokens of every segment; one that is longer than ``capacity`` gets a row of its own.
        capacity: tokens of a row.

    Returns:
        For each row the indices of its segments.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, left in enumerate(room):
            if lengths[index] <= left:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(capacity - lengths[index])
    return rows


def rows_for_masks(lengths: Sequence[int], width_cost: float) -> list[list[int]]:
    """The first-fit rows that cost least where every row attends over its whole width.

    Few long rows hold little padding but much masked attention; many short ones the reverse. The cost of R rows
    of W tokens is taken as R W (1 + width_cost W), and the candidates are the widths that 1, 2, ... rows need.

    Args:
        lengths: tokens of every segment.
        width_cost: cost of attention per key, as a share of all else per token.
    """
    longest, total = max(lengths), sum(lengths)
    candidates = {max(longest, -(-total // rows)) for rows in range(1, len(lengths) + 1)} | {longest}

    def cost(rows: list[list[int]]) -> float:
        width = max(sum(lengths[i] for i in row) for row in rows)
        return len(rows) * width * (1 + width_cost * width)

    return min((first_fit(lengths, width) for width in sorted(candidates)), key=cost)


def pack(
    examples: Sequence[Example],
    *,
    rows: Sequence[Sequence[int]] | None = None,
    multiple: int = 1,
    padding_id: int = 0,
) -> Packed:
    """Lay the examples out.

    Args:
        examples: at least one, each with at least one response; prompts may be empty, responses may not.
        rows: for each row the indices of its examples; None puts all of them, in order, into one row.
        multiple: the width is rounded up to a multiple of this.
        padding_id: fills rows up.
    """
    rows = rows if rows is not None else [range(len(examples))]
    widest = max(sum(examples[i].tokens for i in row) for row in rows)
    width = -(-widest // multiple) * multiple
    shape = (len(rows), width)
    input_ids = np.full(shape, padding_id, dtype=np.int64)
    position_ids, segments, branches = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    pieces: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    passages: dict[tuple[int, int, int], tuple[int, int]] = {}
    calls: list[tuple[int, int, int, int]] = []
    for row, members in enumerate(rows):
        at = 0
        for number, index in enumerate(members):
            example = examples[index]
            prompt, start = len(example.prompt), at
            segments[row, start : start + example.tokens] = number
            input_ids[row, start : start + prompt] = example.prompt
            position_ids[row, start : start + prompt] = np.arange(prompt)
            at += prompt
            for branch, response in enumerate([*example.responses, *example.unscored]):
                length, flat = len(response), row * width + at
                passages[_passage_order(example, branch, index)] = flat, length
                input_ids[row, at : at + length] = response
                position_ids[row, at : at + length] = np.arange(prompt, prompt + length)
                branches[row, at : at + length] = branch + 1
                if branch < len(example.responses):
                    before = np.arange(flat - 1, flat + length - 1)
                    before[0] = row * width + start + prompt - 1
                    scored = slice(0 if prompt else 1, None)
                    pieces[branch, index] = before[scored], np.asarray(response, dtype=np.int64)[scored]
                # The first response goes on causally from its prompt; the others are calls of their own.
                calls.append((at, length, start, prompt) if branch else (start, prompt + length, start, 0))
                at += length
        segments[row, at:] = len(members)
        if at < width:
            calls.append((row * width + at, width - at, row * width + at, 0))
    ordered = [pieces[key] for key in sorted(pieces)]
    return Packed(
        input_ids=input_ids,
        position_ids=position_ids,
        segments=segments,
        branches=branches,
        predicting=np.concatenate([predicting for predicting, _ in ordered]),
        targets=np.concatenate([targets for _, targets in ordered]),
        slots=token_slots([len(targets) for _, targets in ordered]),
        passages=np.array([passages[key] for key in sorted(passages)], dtype=np.int64),
        calls=np.array(calls, dtype=np.int64),
        tokens=sum(example.tokens for example in examples),
    )


def _passage_order(example: Example, branch: int, index: int) -> tuple[int, int, int]:
    """Scored responses in response-major order, then the unscored ones example by example."""
    return (1, index, branch) if branch >= len(example.responses) else (0, branch, index)


def token_slots(lengths: Sequence[int]) -> np.ndarray:
    """(K, longest) places of K responses' tokens that lie one after the other; their total where there are no more."""
    counts = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(counts)
    places = (ends - counts)[:, None] + np.arange(max(counts.max(), 1))
    return np.where(places < ends[:, None], places, ends[-1])
