"""The probability that a policy gives to every well-formed reply: no sampling, no approximation.

Replies share their beginnings, so the slots are walked level by level and every beginning is computed once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.sandbox.grammar import SLOTS, Prompt, fill


@torch.no_grad()
def reply_logps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> np.ndarray:
    """(2304,) float64: log-probability (nats) of every well-formed reply, its end-of-turn token included.

    In the order of `grammar.CHOICES`. The sum of the probabilities is the share of well-formed samples.
    """
    walk = _Walk(model, tokenizer(prompt.text, return_tensors="pt")["input_ids"])
    slots = [
        tokenizer([fill(option, prompt.item) for option in slot], add_special_tokens=False)["input_ids"]
        for slot in SLOTS
    ]
    for options in slots[:-1]:
        walk.extend(options)
    return walk.end([[*option, tokenizer.eos_token_id] for option in slots[-1]]).numpy()


class _Walk:
    """All beginnings of replies up to some slot: B of them after the slots so far."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self._model = model
        self._cache = DynamicCache()
        self._mask = torch.ones_like(prompt)  # (B, tokens in the cache)
        self._next = self._forward(prompt, self._mask)[:, -1]  # (B, V) log-probabilities of what follows
        self.logps = torch.zeros(1, dtype=torch.float64)  # (B,)

    def extend(self, options: Sequence[Sequence[int]]) -> None:
        """Every beginning goes on in each of these ways; the first beginning's ways come first."""
        count, width = len(options), max(map(len, options))
        before = len(self.logps)
        lengths = torch.tensor([len(option) for option in options]).repeat(before)  # (B,)
        tokens = torch.tensor([[*option, *[0] * (width - len(option))] for option in options])
        tokens = tokens.repeat(before, 1)  # (B, W)
        real = torch.arange(width) < lengths[:, None]
        self._cache.batch_repeat_interleave(count)
        self._mask = torch.cat([self._mask.repeat_interleave(count, dim=0), real.long()], dim=1)
        following = self._next.repeat_interleave(count, dim=0)
        after = self._forward(tokens, self._mask)  # (B, W, V)
        # Token t of an option is predicted by the token before it.
        predictions = torch.cat([following[:, None], after[:, :-1]], dim=1)
        found = predictions.gather(2, tokens[:, :, None]).squeeze(2) * real
        self.logps = self.logps.repeat_interleave(count) + found.double().sum(dim=1)
        last = after[torch.arange(len(lengths)), (lengths - 1).clamp(min=0)]
        self._next = torch.where(lengths[:, None] > 0, last, following)

    def end(self, options: Sequence[Sequence[int]]) -> Tensor:
        """(B * options,) log-probabilities of every beginning with each of these endings.

        One ending after the other, with the beginnings' cache as it is: nothing is copied, nothing padded.
        """
        beginnings = len(self._mask)
        parts = []
        for option in options:
            tokens = torch.tensor([option]).expand(beginnings, -1)
            mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=1)[:, :-1]
            predictions = self._next[:, None]
            if len(option) > 1:
                # Nothing follows the last token.
                after = self._forward(tokens[:, :-1], mask)
                predictions = torch.cat([predictions, after], dim=1)
                self._cache.crop(1 - len(option))
            found = predictions.gather(2, tokens[:, :, None]).squeeze(2)
            parts.append(self.logps + found.double().sum(dim=1))
        return torch.stack(parts, dim=1).flatten()

    def _forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, W, V) log-probabilities after each of these tokens, which go into the cache."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        outputs = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return outputs.logits.float().log_softmax(dim=-1)
