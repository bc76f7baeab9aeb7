"""Rows from hub or file -> preference pairs -> tokens, with a receipt of all that happened on the way."""

from prefopt_cli.data.examples import Message, Pair, PreferenceData, Text
from prefopt_cli.data.loading import load
from prefopt_cli.data.receipt import Receipt
from prefopt_cli.data.tokens import TokenizedData, tokenize

__all__ = ["Message", "Pair", "PreferenceData", "Receipt", "Text", "TokenizedData", "load", "tokenize"]
