"""Small random models of many families, and random examples for them."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example

VOCABULARY = 61
LONGEST = 64
"""Positions that every model has, and no more."""

ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    # Weights so large that it matters much what a token attends to.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST, "vocab_size": VOCABULARY},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
}
"""What each family has besides `ROTARY`."""


def build(family: str, *, lora: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A model in training mode without dropout; ``changes`` go into its configuration."""
    attention = changes.pop("attn_implementation", "eager" if family == "gemma2" else None)
    given = FAMILIES.get(family, {})
    config = AutoConfig.for_model(family, **{**({} if family == "gpt2" else ROTARY), **given, **changes})
    config.initializer_range = changes.get("initializer_range", ROTARY["initializer_range"])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    if lora:
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapter.fan_in_fan_out = family == "gpt2"
        model = get_peft_model(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then the other half has no gradient
                nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def examples(lengths: Sequence[Sequence[int]], seed: int = 0) -> list[Example]:
    """For each the tokens of its prompt and of its responses."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    return [Example(tokens(prompt), [tokens(count) for count in counts]) for prompt, *counts in lengths]


def random_lengths(draw: random.Random, count: int, most: int = 12) -> list[list[int]]:
    """Prompts from nothing on, one to four responses from one token on."""
    return [
        [draw.choice([0, 1, draw.randrange(most)])]
        + [draw.choice([1, draw.randrange(1, most)]) for _ in range(draw.randrange(1, 5))]
        for _ in range(count)
    ]


def one_by_one(model: Any, given: Sequence[Example]) -> Tensor:
    """(K,) log-probabilities in response-major order by the model's own logits, a forward pass per response."""
    most = max(len(example.responses) for example in given)
    return torch.stack(
        [
            _logp(model, list(example.prompt), list(example.responses[branch]))
            for branch in range(most)
            for example in given
            if branch < len(example.responses)
        ]
    )


def _logp(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    ids = torch.tensor([prompt + response])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    scored = log_probs.gather(1, ids[0, 1:, None])[:, 0]
    return scored[max(len(prompt) - 1, 0) :].sum()


def logps_and_gradients(
    model: Any, given: Sequence[Example], layout: Layout
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of a batch, and the gradients of a weighted sum of them.

    The weights differ and have both signs, as those of a preference loss.
    """
    layout.prepare(model)
    model.zero_grad()
    logps = score_responses(model, layout.batch(given, 0), layout).logps
    weights = torch.cos(torch.arange(len(logps), dtype=logps.dtype))
    (logps * weights).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return logps.detach(), {name: torch.zeros(()) if g is None else g.clone() for name, g in trained.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
