"""What decides the tokens of a set, in one key: sets with the same key have the same tokens.

What is not known to make no difference counts: a key too many costs time, one too few gives wrong tokens.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import prefopt_cli
from prefopt_cli.data.encoding import Encoding
from prefopt_cli.data.examples import Comparison

PACKAGES = ("transformers", "tokenizers", "jinja2", "regex")


def _code() -> str:
    digest = hashlib.blake2b(prefopt_cli.__version__.encode(), digest_size=16)
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


# When the code is loaded, not when a key is made: it may be edited in between.
CODE = _code()
"""Stands for the code of this room, as its version: one that is kept by hand is forgotten once."""


def tokenizer_identity(tokenizer: Any) -> str | None:
    """All of a tokenizer that its tokens depend on; None where that cannot be told.

    It can of tokenizers of the library ``tokenizers`` that are made of its own parts. Others keep what they do in
    files and code of many kinds. It takes a tenth of a second where the vocabulary is large.
    """
    try:
        backend = tokenizer.backend_tokenizer.to_str()
    except Exception:  # what the library raises for parts written in Python has no class of its own
        return None
    template = tokenizer.chat_template
    return _json(
        {
            "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            "backend": backend,
            "split_special_tokens": tokenizer.split_special_tokens,
            "special_tokens": tokenizer.special_tokens_map,
            "template": template,
            # Such templates write the date into every chat.
            "today": date.today().isoformat() if template and "strftime_now" in _json(template) else None,
        }
    )


def set_key(rows: Sequence[Comparison], encoding: Encoding, tokenizer: str) -> str:
    """64 hexadecimal digits that stand for rows in their order and for how they are tokenised.

    ``tokenizer`` is the ``tokenizer_identity`` of that of ``encoding``. It costs a pass over the text, at some
    100 MB/s.
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in _parts(rows, encoding, tokenizer):
        # JSON has no line breaks of its own, so that no two lists of parts read the same.
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def _parts(rows: Sequence[Comparison], encoding: Encoding, tokenizer: str) -> Iterator[str]:
    yield _json({name: importlib.metadata.version(name) for name in PACKAGES})
    yield _json([CODE, unicodedata.unidata_version])
    yield tokenizer
    yield _json(asdict(encoding.special))
    yield _json([encoding.settings.max_length, encoding.settings.on_overflow])
    degrading = encoding.degrading
    # Not apply_to: what takes no part is left out of the tokens afterwards.
    yield _json(degrading and [sorted(degrading.stopwords), degrading.levels])
    for row in rows:
        yield _json([row.row_id, row.prompt, row.responses, row.ranks, row.notes])


def _json(value: Any) -> str:
    # The order of keys stays: a chat template may go by it.
    return json.dumps(value, ensure_ascii=True, default=str)
