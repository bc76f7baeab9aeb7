"""What a policy does on held-out prompts: its samples, their gold rewards, and how far it is from the base."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.data.examples import Progress
from prefopt_cli.sandbox.exact import reply_logps
from prefopt_cli.sandbox.grammar import Prompt, parse_reply
from prefopt_cli.sandbox.names import DIMENSIONS
from prefopt_cli.sandbox.preferences import text_rewards
from prefopt_cli.sandbox.sampling import Sample, sample_replies

BATCH = 256


@dataclass(frozen=True)
class Measured:
    """Figures of one policy on P prompts with K samples each."""

    samples: list[list[Sample]]
    rewards: dict[str, np.ndarray]
    """By dimension, (P, K) gold rewards."""
    well_formed: np.ndarray
    """(P, K) whether a sample is a well-formed reply."""
    entropy: np.ndarray
    """(P, K) sum over a sample's tokens of the policy's entropy, in nats: its mean is the policy's entropy."""
    kl: np.ndarray
    """(P, K) sum over a sample's tokens of KL(policy || base) over the vocabulary, in nats: its mean is the KL
    of whole replies, with less noise than the difference of log-probabilities has. Replies are cut off after the
    length of the longest well-formed one, and so is the sum: for a policy that runs on, both are lower bounds."""
    distinct: np.ndarray
    """(P,) different samples of a prompt / K."""


def measure(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    per_prompt: int,
    *,
    seed: int,
    progress: Progress | None = None,
    name: str = "policy",
) -> Measured:
    """Sample ``per_prompt`` replies to every prompt at temperature 1 and look at them."""
    samples = sample_replies(
        model, tokenizer, prompts, per_prompt, seed=seed, progress=progress, task=f"sampling {name}"
    )
    flat = [sample for drawn in samples for sample in drawn]
    worth = [text_rewards(sample.prompt, sample.text) for sample in flat]
    shape = (len(prompts), per_prompt)
    entropy, kl = _entropy_and_kl(model, base, tokenizer, flat)
    return Measured(
        samples=samples,
        rewards={
            dimension: np.array([each[dimension] for each in worth]).reshape(shape)
            for dimension in DIMENSIONS
        },
        well_formed=np.array(
            [parse_reply(sample.prompt, sample.text) is not None for sample in flat], dtype=float
        ).reshape(shape),
        entropy=entropy.reshape(shape),
        kl=kl.reshape(shape),
        distinct=np.array([len({sample.text for sample in drawn}) / per_prompt for drawn in samples]),
    )


@torch.no_grad()
def _entropy_and_kl(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
) -> tuple[np.ndarray, np.ndarray]:
    """Two (N,) arrays, in nats, summed over each sample's positions."""
    entropy, kl = np.empty(len(samples)), np.empty(len(samples))
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        pairs = [(tokenizer(sample.prompt.text)["input_ids"], sample.token_ids) for sample in batch]
        policy, positions = next_token_logps(model, pairs)
        reference, _ = next_token_logps(base, pairs)
        chances = policy.exp()
        entropy[start : start + BATCH] = _total(-(chances * policy).sum(dim=-1), positions)
        kl[start : start + BATCH] = _total((chances * (policy - reference)).sum(dim=-1), positions)
    return entropy, kl


def next_token_logps(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the next token at every position of a batch of (prompt, reply) in tokens.

    Returns:
        (N, T - 1, V) float32 log-probabilities, and (N, T - 1) whether the next token is one of the reply.
    """
    width = max(len(prompt) + len(reply) for prompt, reply in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    replies = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor([*prompt, *reply])
        mask[row, :end] = 1
        replies[row, len(prompt) : end] = True
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.float().log_softmax(dim=-1), replies[:, 1:]


@torch.no_grad()
def text_logps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]
) -> np.ndarray:
    """(N,) log-probability, in nats, of each (prompt, reply) with its end-of-turn token."""
    found = np.empty(len(texts))
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        pairs = [
            (
                tokenizer(prompt)["input_ids"],
                tokenizer(reply + tokenizer.eos_token, add_special_tokens=False)["input_ids"],
            )
            for prompt, reply in batch
        ]
        logps, positions = next_token_logps(model, pairs)
        width = logps.shape[1] + 1
        ids = torch.tensor([[*p, *r, *[0] * (width - len(p) - len(r))] for p, r in pairs])
        found[start : start + BATCH] = _total(logps.gather(2, ids[:, 1:, None]).squeeze(2), positions)
    return found


def _total(values: Tensor, positions: Tensor) -> np.ndarray:
    """Sums over the positions of each row."""
    return (values.double() * positions).sum(dim=1).numpy()


def exact_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    progress: Progress | None = None,
    name: str = "policy",
) -> np.ndarray:
    """(P, 2304) log-probability of every well-formed reply to every prompt (see `exact.reply_logps`)."""
    rows = []
    for number, prompt in enumerate(prompts):
        rows.append(reply_logps(model, tokenizer, prompt))
        if progress:
            progress(f"all replies of {name}", number + 1, len(prompts))
    return np.array(rows)
