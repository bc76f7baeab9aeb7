"""Replies that a policy writes, at temperature 1 and untouched by top-k or top-p: a fair sample of the policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.data.examples import Progress
from prefopt_cli.sandbox.base import build_tokenizer, fixed_threads
from prefopt_cli.sandbox.grammar import CHOICES, ITEMS, Prompt, reply_text

BATCH = 512
THREADS = 1
"""A second one brings a quarter where nothing else runs, and costs several times as much where something does."""


@dataclass(frozen=True)
class Sample:
    """One reply to a prompt."""

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    """With the end-of-turn token, unless the reply ran into the limit."""


@cache
def longest_reply() -> int:
    """Tokens of the longest well-formed reply, its end-of-turn token included."""
    texts = [reply_text(Prompt(ITEMS[0], "", ""), choice) for choice in CHOICES]
    return 1 + max(map(len, build_tokenizer()(texts, add_special_tokens=False)["input_ids"]))


@torch.no_grad()
def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    per_prompt: int,
    *,
    seed: int,
    progress: Progress | None = None,
    task: str = "sampling replies",
) -> list[list[Sample]]:
    """``per_prompt`` replies to every prompt; the same seed gives the same replies.

    A reply that is longer than any well-formed one is cut off there, and so is none.
    """
    model.eval()
    found: list[list[Sample]] = []
    size = max(1, BATCH // per_prompt)
    with fixed_threads(THREADS), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            rows = _generate(model, tokenizer, batch, per_prompt)
            texts = tokenizer.batch_decode(rows)
            samples = [
                Sample(batch[n // per_prompt], text.removesuffix(tokenizer.eos_token), row)
                for n, (row, text) in enumerate(zip(rows, texts, strict=True))
            ]
            found += [samples[n : n + per_prompt] for n in range(0, len(samples), per_prompt)]
            if progress:
                progress(task, min(start + size, len(prompts)), len(prompts))
    return found


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], per_prompt: int
) -> list[tuple[int, ...]]:
    """The new tokens of every reply, up to and including its end-of-turn token."""
    encoded = tokenizer(
        [prompt.text for prompt in prompts], return_tensors="pt", padding=True, padding_side="left"
    )
    made: Tensor = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=per_prompt,
        max_new_tokens=longest_reply() + 1,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = made[:, encoded["input_ids"].shape[1] :].tolist()
    return [
        tuple(row[: row.index(tokenizer.eos_token_id) + 1]) if tokenizer.eos_token_id in row else tuple(row)
        for row in rows
    ]
