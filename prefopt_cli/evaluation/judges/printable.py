"""Text of models and servers, made fit for a terminal."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""What a terminal would obey, or what nobody would see: controls, zero-width characters, overrides of direction."""


def printable(text: str) -> str:
    """The text with a mark in place of every such character."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
