"""Exact probabilities and estimates from samples, against plain forward passes of a small random model."""

from random import Random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt_cli.sandbox.base import build_tokenizer
from prefopt_cli.sandbox.exact import reply_logps
from prefopt_cli.sandbox.grammar import CHOICES, Prompt, draw_prompts, reply_text
from prefopt_cli.sandbox.measure import measure, text_logps

PROMPTS = draw_prompts(6, Random(3))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform, so that mistakes show
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return _model(tokenizer, 0)


def _plain_logp(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: Prompt, reply: str
) -> float:
    before = tokenizer(prompt.text)["input_ids"]
    tokens = tokenizer(reply, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([before + tokens])).logits[0].double().log_softmax(-1)
    return sum(logps[len(before) - 1 + n, token].item() for n, token in enumerate(tokens))


def test_every_reply_has_its_own_probability(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = reply_logps(model, tokenizer, PROMPTS[0])
    assert found.shape == (len(CHOICES),)
    # The empty options and the last reply are where walking the slots could go astray.
    for number in (0, 1, len(CHOICES) - 1, *Random(0).sample(range(len(CHOICES)), 40)):
        plain = _plain_logp(model, tokenizer, PROMPTS[0], reply_text(PROMPTS[0], CHOICES[number]))
        assert found[number] == pytest.approx(plain, abs=1e-4)


def test_batches_of_texts_agree(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [(prompt.text, reply_text(prompt, CHOICES[300 * n])) for n, prompt in enumerate(PROMPTS)]
    plain = [
        _plain_logp(model, tokenizer, prompt, text) for prompt, (_, text) in zip(PROMPTS, texts, strict=True)
    ]
    assert text_logps(model, tokenizer, texts) == pytest.approx(plain, abs=1e-4)


def test_kl_and_entropy_of_samples_are_unbiased(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Summed over positions they have the mean of log pi - log base and of -log pi over whole samples."""
    base = _model(tokenizer, 1)
    measured = measure(model, base, tokenizer, PROMPTS, 150, seed=0)
    samples = [sample for drawn in measured.samples for sample in drawn]
    policy_logps, base_logps = [], []
    for sample in samples:
        before = tokenizer(sample.prompt.text)["input_ids"]
        tokens = list(sample.token_ids)
        with torch.no_grad():
            for each, into in ((model, policy_logps), (base, base_logps)):
                logps = each(torch.tensor([before + tokens])).logits[0].double().log_softmax(-1)
                into.append(sum(logps[len(before) - 1 + n, token].item() for n, token in enumerate(tokens)))
    ratio = np.array(policy_logps) - np.array(base_logps)
    surprise = -np.array(policy_logps)
    for direct, summed in ((ratio, measured.kl.ravel()), (surprise, measured.entropy.ravel())):
        difference = direct - summed
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(samples))
        assert summed.mean() > 1.0  # there is something to be biased about


def test_a_policy_is_no_distance_from_itself(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    measured = measure(model, model, tokenizer, PROMPTS, 4, seed=0)
    assert np.abs(measured.kl).max() < 1e-4
    assert measured.rewards["polite"].shape == (len(PROMPTS), 4)


def test_samples_repeat_with_their_seed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (
        [
            [sample.token_ids for sample in drawn]
            for drawn in measure(model, model, tokenizer, PROMPTS, 2, seed=seed).samples
        ]
        for seed in (1, 1, 2)
    )
    assert first == again != other
