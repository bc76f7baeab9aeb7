"""Responses of lower degree: the same response with more and more of its key phrases removed.

After Li et al. 2024 (Self-supervised Preference Optimization, arXiv 2409.17791). How many levels there
are, that the best-scored phrases go first, and that equal levels are merged is our choice.
"""

from __future__ import annotations

from collections.abc import Collection

from prefopt_cli.data.examples import Text
from prefopt_cli.data.keyphrases import Candidate, candidates, has_word, score_phrases
from prefopt_cli.data.removal import remove


def removed_counts(phrases: int, levels: int) -> list[tuple[int, int]]:
    """(level k, key phrases removed at it) for k = 0 .. ``levels`` - 1, mildest first.

    Level k of K removes round(n k / K) of n ``phrases``; of levels that remove as many, the lowest stays.
    Source: Li et al., arXiv 2409.17791; number of levels, order and merging are our choice.
    """
    lowest: dict[int, int] = {}
    for level in range(levels):
        lowest.setdefault(round(phrases * level / levels), level)
    return [(level, count) for count, level in lowest.items()]


def degrade(response: Text, stopwords: Collection[str], levels: int) -> list[tuple[int, Text]]:
    """(level, ``response`` without its top key phrases) for the levels from 1 on, mildest first.

    All occurrences of a phrase go, but not those inside a longer phrase. In messages, the phrases of all the
    assistant's texts are ranked together; every other message stays as it is. Left out are levels that leave
    no word and levels that read as a milder one does. Empty: the response takes no part.

    Source: Li et al., arXiv 2409.17791; number of levels, order and merging are our choice.
    """
    stopwords = frozenset(stopwords)
    texts = _own_texts(response)
    found = [candidates(text, stopwords) for text in texts]
    ranked = [phrase for phrase, _ in score_phrases(one for each in found for one in each)]
    degraded: list[tuple[int, Text]] = []
    last = texts
    for level, count in removed_counts(len(ranked), levels):
        gone = frozenset(ranked[:count])
        left = [_without(text, each, gone) for text, each in zip(texts, found, strict=True)]
        if left != last and any(map(has_word, left)):
            degraded.append((level, _with_texts(response, left)))
            last = left
    return degraded


def _without(text: str, found: list[Candidate], gone: frozenset[str]) -> str:
    return remove(text, [(one.start, one.end) for one in found if one.phrase in gone])


def _own_texts(response: Text) -> list[str]:
    """What the assistant itself says in ``response``; content that is not plain text is passed over."""
    if isinstance(response, str):
        return [response]
    return [message["content"] for message in response if _is_own(message)]


def _with_texts(response: Text, texts: list[str]) -> Text:
    if isinstance(response, str):
        return texts[0]
    left = iter(texts)
    return [{**message, "content": next(left)} if _is_own(message) else message for message in response]


def _is_own(message: dict[str, object]) -> bool:
    return message.get("role") == "assistant" and isinstance(message.get("content"), str)
