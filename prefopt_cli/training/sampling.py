"""Responses that a policy writes: from its own distribution, or from a sharper one, and nothing else about them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from prefopt_cli.errors import PrefoptError
from prefopt_cli.scoring.forward import at_rest, plain_model
from prefopt_cli.training.engines import is_sharded


def sample_responses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    padding_id: int,
    seed: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[list[int]]:
    """One response to every prompt, drawn from the policy as it is.

    The model's generation settings have no say, and neither has the state of the random generators, which is left as
    it was: the same weights and arguments give the same responses. Mode, attention and settings of the model are
    left as they were, too.

    Args:
        model: a causal language model of transformers, peft's wrapper (whose active adapter takes part) or not, on
            its device; not wrapped for several processes, unless it is sharded by FSDP: every process must call this
            then, with prompts of its own.
        prompts: tokens of each, at least one.
        max_new_tokens: a response that has not stopped by then is cut off, and has no stop token.
        stop_ids: tokens any of which ends a response; it is part of it.
        padding_id: fills batches up on their left, where no token sees it.
        seed: of the random stream. Or one for each prompt: a response then depends on its own alone, up to rounding,
            and not on what else is in the batch.
        temperature: logits are divided by it; 0 takes the likeliest token every time.
        top_p: the likeliest tokens that together have this probability are drawn from.
        autocast: the precision to run the model in.

    Returns:
        The responses, at least one token each, in the order of the prompts.

    Raises:
        PrefoptError: a prompt has no tokens.
    """
    if not all(map(len, prompts)):
        raise PrefoptError("A policy cannot answer a prompt without tokens: nothing predicts the first one.")
    plain = plain_model(model)
    # All processes must go on as long as any does: each has a part of every weight.
    sharded = is_sharded(model)
    writer: Any = model if sharded else plain
    shared = isinstance(seed, int)
    settings = _settings(max_new_tokens, stop_ids, padding_id, temperature, top_p, draws=shared)
    with at_rest(model), _ready_to_generate(plain), _random_stream(plain, seed), autocast():
        inputs = _left_padded(prompts, padding_id, plain.device)
        if not isinstance(seed, int) and temperature > 0:
            inputs["logits_processor"] = _own_streams(seed, temperature, top_p, plain.device)
        made: Tensor = writer.generate(**inputs, generation_config=settings, synced_gpus=sharded)
    return [_until_stop(tokens, stop_ids) for tokens in made[:, inputs["input_ids"].size(1) :].tolist()]


def _settings(
    max_new_tokens: int,
    stop_ids: Sequence[int],
    padding_id: int,
    temperature: float,
    top_p: float,
    *,
    draws: bool,
) -> GenerationConfig:
    """Plain sampling, or the highest score. What the library would fill in by itself (top_k is 50) is named."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    return GenerationConfig(
        **(sampling if draws and temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=padding_id,
        use_cache=True,
    )


def _own_streams(
    seeds: Sequence[int], temperature: float, top_p: float, device: torch.device
) -> LogitsProcessorList:
    """What makes the highest score a sample, with random numbers of each row's own."""
    return LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), _GumbelNoise(seeds, device)]
    )


class _GumbelNoise(LogitsProcessor):
    """Adds noise with which the highest score is a draw from the softmax of the scores."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        drawn_on = device if device.type == "cuda" else torch.device("cpu")
        self._streams = [torch.Generator(drawn_on).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In float32 one draw in 2^24 would be zero, and its token be taken however unlikely it is.
        exponential = torch.empty(scores.shape, dtype=torch.float64, device=self._streams[0].device)
        for row, stream in zip(exponential, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores - exponential.log().to(scores)


@contextmanager
def _ready_to_generate(plain: Any) -> Iterator[None]:
    """Without generation settings of the model's own, and with an attention that takes a few queries and a cache."""
    # The library merges the model's settings into those that it is given.
    own, attention = plain.generation_config, plain.config._attn_implementation
    plain.generation_config = GenerationConfig()
    try:
        if attention == "flex_attention":
            plain.set_attn_implementation(_dense_attention(plain))
        yield
    finally:
        plain.generation_config = own
        if plain.config._attn_implementation != attention:
            plain.set_attn_implementation(attention)


def _dense_attention(plain: Any) -> str:
    """What stands in for FlexAttention; sdpa knows no soft cap and would sample from another distribution."""
    softcap = getattr(plain.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if softcap is None and plain._supports_sdpa else "eager"


@contextmanager
def _random_stream(plain: nn.Module, seed: int | Sequence[int]) -> Iterator[None]:
    """Random numbers from this seed, if it is one for all, and afterwards those that would have come without."""
    devices = {parameter.device for parameter in plain.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        if isinstance(seed, int):
            torch.manual_seed(seed)
        yield


def _left_padded(prompts: Sequence[Sequence[int]], padding_id: int, device: torch.device) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask``, each (B, longest)."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), padding_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Up to the first stop token and with it: what the library filled up behind it is cut off."""
    stops = {*map(int, stop_ids)}
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in stops), None)]
