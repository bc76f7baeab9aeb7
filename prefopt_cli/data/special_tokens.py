"""What a tokenizer and its chat template do at the two ends of a text: begin-of-sequence and end-of-turn.

Found out once by looking at what they produce, not by model names: configurations disagree with
behaviour too often.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2

from prefopt_cli.data.examples import Comparison, Message
from prefopt_cli.errors import UserError

SENTINEL = "PrefoptSentinel"
"""Stands for a response's content while the template is looked at."""
PROBES = 20
"""Chats tried before a template that refuses all of them is given up."""


@dataclass(frozen=True)
class ChatEnd:
    """How the template ends a response: ``turn_id``, then ``noise``, text that no policy generates.

    ``from_template`` is False where the template writes no end-of-turn token, so that eos is appended.
    """

    turn: str
    turn_id: int
    noise: str
    from_template: bool
    writes_bos: bool


@dataclass(frozen=True)
class SpecialTokens:
    """``prefix``: ids that the tokenizer puts in front of a text by itself (none, or its BOS).

    ``chat`` is None where the data has no messages, ``plain`` False where it has nothing else.
    """

    prefix: tuple[int, ...]
    prefix_text: str
    appends_eos: bool
    eos: str
    eos_id: int
    plain: bool
    chat: ChatEnd | None

    def with_prefix(self, ids: list[int]) -> tuple[list[int], int]:
        """``ids`` with the prefix exactly once in front, and how often it was there."""
        size, found = len(self.prefix), 0
        if not size:
            return ids, 0
        while tuple(ids[found * size : (found + 1) * size]) == self.prefix:
            found += 1
        return [*self.prefix, *ids[found * size :]], found

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the end-of-turn of the data's chats, if it has any, then eos."""
        turn = [self.chat.turn_id] if self.chat else []
        return tuple(dict.fromkeys([*turn, self.eos_id]))

    def verdict(self) -> str:
        """One sentence or two on who writes BOS and end-of-turn, for the receipt."""
        parts = [self._bos_verdict()]
        if self.plain:
            parts.append(f"{self.eos} ends every plain-text response (appended by prefopt).")
        if self.chat:
            parts.append(self._turn_verdict(self.chat))
        if self.appends_eos:
            parts.append(f"The tokenizer would append {self.eos} to every text; prompts go without it.")
        return " ".join(parts)

    def _bos_verdict(self) -> str:
        if not self.prefix:
            by_template = self.chat and self.chat.writes_bos
            return (
                "BOS comes from the chat template alone."
                if by_template
                else "No BOS: this tokenizer adds none."
            )
        once = f"Exactly one BOS {self.prefix_text} starts every prompt"
        if self.chat is None:
            return f"{once}, as the tokenizer adds it by itself."
        if self.chat.writes_bos:
            return f"{once}: the chat template writes it, and the tokenizer's own is not added to it."
        return f"{once}: the chat template leaves it out though the tokenizer adds one, so prefopt adds it."

    @staticmethod
    def _turn_verdict(chat: ChatEnd) -> str:
        if not chat.from_template:
            return f"The chat template writes no end-of-turn; {chat.turn} is appended to every response."
        noise = f"; the {chat.noise!r} that it writes after it is left out" if chat.noise else ""
        return f"{chat.turn} from the chat template ends every response{noise}."

    def to_dict(self) -> dict[str, Any]:
        """The verdict and the facts it rests on."""
        facts: dict[str, Any] = {
            "verdict": self.verdict(),
            "bos": self.prefix_text or None,
            "bos_ids": list(self.prefix),
            "eos": self.eos,
            "eos_id": self.eos_id,
            "tokenizer_appends_eos": self.appends_eos,
        }
        if self.chat:
            facts |= {
                "end_of_turn": self.chat.turn,
                "end_of_turn_id": self.chat.turn_id,
                "end_of_turn_from": "template" if self.chat.from_template else "prefopt",
                "template_writes_bos": self.chat.writes_bos,
                "left_out_after_end_of_turn": self.chat.noise,
            }
        return facts


def probe(tokenizer: Any, rows: Iterable[Comparison]) -> SpecialTokens:
    """Look at what ``tokenizer`` does, on a text and on the first chats among ``rows``.

    Raises:
        UserError: the tokenizer has no eos token; or there are chats and it has no template, or its
            template fails on them.
    """
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos token, so responses cannot end; set one and save the tokenizer"
        )
    rows = list(rows)
    chats = [row for row in rows if row.is_chat]
    bare = encode(tokenizer, ["a"])[0]
    dressed = list(tokenizer("a")["input_ids"])
    start = next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)
    prefix = tuple(dressed[:start])
    return SpecialTokens(
        prefix=prefix,
        prefix_text=tokenizer.decode(list(prefix)) if prefix else "",
        appends_eos=dressed[start + len(bare) :] == [tokenizer.eos_token_id],
        eos=tokenizer.eos_token,
        eos_id=tokenizer.eos_token_id,
        plain=len(chats) < len(rows),
        chat=_chat_end(tokenizer, chats, prefix) if chats else None,
    )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of ``texts`` exactly as they stand: nothing added, nothing cut, no warning about lengths."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def render(tokenizer: Any, messages: list[Message], *, generation_prompt: bool) -> str:
    """The chat template's text. Raises jinja2.TemplateError where the template refuses the messages."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def _chat_end(tokenizer: Any, chats: list[Comparison], prefix: tuple[int, ...]) -> ChatEnd:
    if not tokenizer.chat_template:
        raise UserError(
            "the data has chat messages but the tokenizer has no chat template\n"
            "  give one with `model.chat_template: path/to/template.jinja`, or use plain-text data"
        )
    rendered = _render_probe(tokenizer, chats)
    _, found, tail = rendered.rpartition(SENTINEL)
    turn = _turn_in(tokenizer, tail) if found else None
    bos = tokenizer.decode(list(prefix)) if prefix else tokenizer.bos_token
    writes_bos = bool(bos) and rendered.startswith(bos)
    if turn is None:
        noise = tail[len(tail.rstrip()) :]
        return ChatEnd(tokenizer.eos_token, tokenizer.eos_token_id, noise, False, writes_bos)
    noise = tail[tail.index(turn) + len(turn) :]
    return ChatEnd(turn, tokenizer.convert_tokens_to_ids(turn), noise, True, writes_bos)


def _render_probe(tokenizer: Any, chats: list[Comparison]) -> str:
    """A chat of the data with a sentinel as the response's last words, rendered."""
    refusal: Exception | None = None
    for row in islice(chats, PROBES):
        earlier = row.responses[0][:-1] if row.responses else ()
        messages = [*row.prompt, *earlier, {"role": "assistant", "content": SENTINEL}]
        try:
            return render(tokenizer, messages, generation_prompt=False)
        except jinja2.TemplateError as error:
            refusal = error
    raise UserError(f"the chat template refuses the data: {refusal}") from refusal


def _turn_in(tokenizer: Any, tail: str) -> str | None:
    """The first special token in the text after a response; failing that, the first added one."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    special = [text for text, is_special in added.items() if is_special] + list(tokenizer.all_special_tokens)
    for candidates in (special, list(added)):
        present = [text for text in candidates if text.strip() and text in tail]
        if present:
            return min(present, key=lambda text: (tail.index(text), -len(text)))
    return None
