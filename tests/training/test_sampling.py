"""Sampled responses come from the policy's own distribution, and nothing else changes by drawing them."""

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import GenerationConfig

from prefopt_cli.errors import PrefoptError
from prefopt_cli.scoring.forward import reference_states, score_samples
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.sampling import sample_responses
from tests.scoring.build import FAMILIES, VOCABULARY, build, examples

PROMPTS = [example.prompt for example in examples([[n, 1] for n in (5, 2, 9, 1, 7)])]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": (2, 5), "padding_id": 0, "seed": 0}
SHAPING: dict[str, Any] = {
    "do_sample": False,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "min_length": 40,
    "min_new_tokens": 12,
    "bad_words_ids": [[7]],
    "suppress_tokens": [8, 9],
    "begin_suppress_tokens": [10],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 2,
    "sequence_bias": {(11,): 10.0},
    "exponential_decay_length_penalty": (1, 2.0),
    "guidance_scale": 2.0,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_length": 3,
    "eos_token_id": 30,
    "pad_token_id": 31,
}
"""All that a model's own settings may ask for."""


def draw(model: Any, prompts: Any = PROMPTS, **changes: Any) -> list[list[int]]:
    return sample_responses(model, prompts, **{**SETTINGS, **changes})


def mild(family: str = "llama", **changes: Any) -> Any:
    """A model whose next tokens all have a chance: a bound on frequencies means nothing for rare ones."""
    return build(family, **{"initializer_range": 0.05, **changes})


def next_token(model: Any, prompt: list[int]) -> Tensor:
    """(V,) probabilities by the model's own logits."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)


def require_frequencies(tokens: list[int], probabilities: Tensor) -> None:
    """Pearson's statistic within five standard deviations of its mean, which is the degrees of freedom."""
    expected = probabilities * len(tokens)
    assert expected.min() > 5
    statistic = ((torch.tensor(tokens).bincount(minlength=VOCABULARY) - expected).square() / expected).sum()
    freedom = VOCABULARY - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def shaped(model: Any) -> Any:
    """Set past the library's own checks, some of which refuse such a mixture."""
    settings = GenerationConfig()
    for name, value in SHAPING.items():
        setattr(settings, name, value)
    model.generation_config = settings
    return model


@pytest.mark.parametrize("beside", [[], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]], ids=["alone", "padded"])
@pytest.mark.parametrize("change", ["", "generation_config"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_as_frequent_as_they_are_likely(family: str, change: str, beside: list[int]) -> None:
    """Also on the left of whose prompt there is padding, and whatever the model's own settings ask for."""
    count, prompt = 8000, [20, 21, 22]
    model = mild(family)
    expected = next_token(model, prompt)
    if change:
        shaped(model)

    found = draw(model, [prompt] * count + [beside] * bool(beside), max_new_tokens=1)

    require_frequencies([response[0] for response in found[:count]], expected)


def test_the_second_token_has_the_first_one_before_it() -> None:
    model, prompt, count = mild(), [20, 21, 22], 60_000
    pairs = draw(shaped(model), [prompt] * count, max_new_tokens=2, stop_ids=())
    first = max(range(VOCABULARY), key=lambda token: float(next_token(model, prompt)[token]))

    followers = [second for token, second in pairs if token == first]

    require_frequencies(followers, next_token(model, [*prompt, first]))


@pytest.mark.parametrize("family", FAMILIES)
def test_preparation_for_packing_changes_no_sample(family: str) -> None:
    model = build(family)
    before = draw(model)

    Layout("mask" if family == "gemma2" else "pieces").prepare(model)
    after = draw(model)

    assert after == before
    assert {len(response) for response in before} - {1}
    again = draw(model, seed=1)
    assert again != before


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_surprise_the_padded_scoring_as_much_as_its_entropy_says(family: str) -> None:
    """Drawn from other distributions (a cache, padding or positions gone wrong) they would not."""
    model = build(family, initializer_range=0.1)
    layout = Layout()
    layout.prepare(model)
    responses = draw(model, PROMPTS * 40, stop_ids=(), max_new_tokens=8)
    given = [Example(prompt, (response,)) for prompt, response in zip(PROMPTS * 40, responses, strict=True)]
    batch = layout.batch(given, 0)

    with torch.no_grad():
        scores = score_samples(model, batch, layout, reference_states(model, batch, layout))

    # At every token E[-log p(y)] is the entropy.
    surprise = -scores.log_probs.sum(1) - scores.entropy.sum(1)
    assert scores.mask.all()
    assert abs(surprise.mean()) < 4 * surprise.std() / len(surprise) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_as_generated_are_those_of_a_padded_scoring(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The library's own logits at every step, with its cache and padding, against one forward pass."""
    model = build(family)
    steps: list[Tensor] = []
    forward = model.forward

    @functools.wraps(forward)  # the library looks at its arguments
    def watched(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        steps.append(outputs.logits[:, -1].float().log_softmax(-1))
        return outputs

    monkeypatch.setattr(model, "forward", watched)
    responses = draw(model)
    monkeypatch.undo()
    generated = [
        sum(float(steps[step][index, token]) for step, token in enumerate(response))
        for index, response in enumerate(responses)
    ]
    layout = Layout()
    layout.prepare(model)
    given = [Example(prompt, (response,)) for prompt, response in zip(PROMPTS, responses, strict=True)]
    batch = layout.batch(given, 0)
    with torch.no_grad():
        scores = score_samples(model, batch, layout, reference_states(model, batch, layout))

    torch.testing.assert_close(torch.tensor(generated), scores.log_probs.sum(1), rtol=1e-5, atol=1e-4)


def test_either_stop_token_ends_a_response_and_is_part_of_it() -> None:
    responses = draw(mild(), PROMPTS * 40)

    last = [response[-1] for response in responses]
    assert {2, 5} <= set(last)
    for response in responses:
        assert 1 <= len(response) <= 12
        assert not {2, 5} & set(response[:-1])
        assert response[-1] in (2, 5) or len(response) == 12
    assert any(response[-1] not in (2, 5) for response in responses)


def test_without_stop_tokens_every_response_is_as_long_as_it_may_be() -> None:
    """The model's own end-of-turn token is none."""
    model = shaped(mild())

    assert {len(response) for response in draw(model, PROMPTS * 40, stop_ids=())} == {12}


def test_padding_may_be_a_stop_token() -> None:
    responses = draw(mild(), PROMPTS * 40, padding_id=2)

    assert all(2 not in response[:-1] for response in responses)
    assert responses == draw(mild(), PROMPTS * 40)


def test_tokens_beyond_the_tokenizers_are_drawn_as_the_policy_has_them() -> None:
    responses = draw(mild(), PROMPTS * 40, stop_ids=())

    assert {token for response in responses for token in response} == set(range(VOCABULARY))


def test_the_same_arguments_give_the_same_samples_whatever_was_drawn_before() -> None:
    model = mild()
    torch.manual_seed(3)
    first = draw(model)
    torch.rand(100)

    assert draw(model) == first
    assert draw(model, seed=1) != first


def test_the_random_generators_are_left_as_they_were() -> None:
    model = mild()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()

    draw(model)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PrefoptError, match="without tokens"):
        draw(mild(), [[4, 5], []])


def test_the_model_is_left_as_it_was() -> None:
    """In training, with gradient checkpointing, a switched-off cache and settings of its own."""
    model = shaped(build("llama", attention_dropout=0.5))
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.model.layers[1].eval()
    settings, modes = model.generation_config, [module.training for module in model.modules()]
    widths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))

    first, second = draw(model), draw(model)

    assert first == second  # no dropout
    assert set(widths[1 : len(widths) // 2]) == {1}  # a cache
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    assert model.generation_config is settings
    assert settings.top_k == 1
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_draw_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", attn_implementation="flex_attention")
    settings = model.generation_config
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        draw(model)

    assert model.training
    assert model.generation_config is settings
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(
    ("family", "instead", "changes"),
    [
        ("llama", "sdpa", {}),
        ("gemma2", "eager", {}),
        ("gemma3_text", "eager", {"attn_logit_softcapping": 0.5}),
    ],
)
def test_flex_attention_is_switched_off_meanwhile(family: str, instead: str, changes: dict[str, Any]) -> None:
    """For one that computes the same: sdpa would drop a soft cap, where it is possible at all."""
    expected = draw(build(family, attn_implementation=instead, **changes))
    model = build(family, attn_implementation="flex_attention", **changes)
    used = set()
    model.model.layers[0].register_forward_pre_hook(lambda *_: used.add(model.config._attn_implementation))

    assert draw(model) == expected
    assert used == {instead}
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_the_adapter_that_is_active_takes_part(packed: bool) -> None:
    model = build("llama", lora=True)
    if packed:
        Layout("pieces").prepare(model)
    adapted = draw(model)
    with model.disable_adapter():
        plain = draw(model)

    assert plain == draw(build("llama"))
    assert adapted == draw(build("llama", lora=True).merge_and_unload())
    assert adapted != plain
    assert model.training
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_draw_inside_an_autocast_leaves_the_policy_its_gradients() -> None:
    """Some versions of torch keep the casts of its weights, which have no way back to them."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        draw(model)
        model(input_ids=torch.tensor([PROMPTS[0]])).logits.sum().backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_precision_is_the_callers() -> None:
    model = build("llama")
    types = set()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: types.add(output.dtype))

    draw(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))

    assert types == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_accelerate_has_prepared_gives_the_same_samples(family: str) -> None:
    """Through its wrapper of the forward pass the library must still see that the model takes positions."""
    model = build(family)
    Layout("pieces").prepare(model)
    expected = draw(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model) is model
    finally:  # it is the process's, and other tests want another precision
        AcceleratorState._reset_state(reset_partial_state=True)

    assert "forward" in vars(model)
    assert draw(model) == expected
