"""Rows of token ids as text for a person to read."""

from itertools import pairwise

from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")


def side_of(ranks: list[int], number: int) -> str:
    """What a row's response of this number is called; it is said where several tie."""
    if len(ranks) == 2:
        return SIDES[number]
    return f"response {number + 1}{' (tied)' if ranks.count(ranks[number]) > 1 else ''}"


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Every token as the text that it adds to its predecessor: alone, some tokenizers drop its space."""
    alone = [tokenizer.decode([token]) for token in ids]
    found = alone[:1]
    for before, (first, second) in zip(alone, pairwise(ids), strict=False):
        added = tokenizer.decode([first, second]).removeprefix(before)
        found.append(added or tokenizer.convert_ids_to_tokens(second))
    return found


def text_after(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> str:
    """What tokens add to the text of the prompt before them."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    # A prompt may end within a character, and a tokenizer may tidy up where the two meet.
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(ids)
