"""Rows from hub or file -> compared responses -> tokens, with a receipt of all that happened on the way."""

from prefopt_cli.data.examples import Comparison, Message, PreferenceData, Text
from prefopt_cli.data.loading import load
from prefopt_cli.data.receipt import Receipt
from prefopt_cli.data.tokens import TokenizedData, tokenize

__all__ = ["Comparison", "Message", "PreferenceData", "Receipt", "Text", "TokenizedData", "load", "tokenize"]
