"""The divergence in chunks against the plain formula, derived by autograd, and through models against their logits."""

import copy
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.trainer.utils import use_adapter

from prefopt_cli.losses.soft import token_kl
from prefopt_cli.scoring import divergence, head
from prefopt_cli.scoring.divergence import HeadStates, TokenDivergence, token_divergence
from prefopt_cli.scoring.forward import reference_states, score_responses, score_samples
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.memory_log import AllocationLog
from prefopt_cli.training.memory_stand_ins import head_stand_ins
from tests.scoring.build import FAMILIES, build, examples, random_lengths, relative

COUNT, HIDDEN, VOCABULARY = 23, 7, 41
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "both": {"scale": 1.7, "softcap": 5.0},
}
TRAINED = ("hidden", "weight", "bias")

PADDED, PIECES = Layout(), Layout("pieces")
MASK, ROWS = Layout("mask"), Layout("mask", width_cost=1.0)
ADDITIVE = Layout("mask", mask_dtype=torch.float32, width_cost=1.0)
LENGTHS = [[5, 7, 3], [0, 4, 6], [8, 1, 9], [3, 1, 1], [2, 11, 2], [1, 2, 2]]
TOLERANCE = 1e-5


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(dtype: torch.dtype = torch.float64, count: int = COUNT, *, bias: bool = True) -> dict[str, Any]:
    """The reference requires a gradient, so that one that it gets is seen."""
    generator = torch.Generator().manual_seed(0)

    def states(width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return (
            draw(generator, dtype, count, width),
            draw(generator, dtype, VOCABULARY, width),
            draw(generator, dtype, VOCABULARY) if bias else None,
        )

    return {
        **dict(zip(TRAINED, states(HIDDEN), strict=True)),
        "targets": torch.randint(0, VOCABULARY, (count,), generator=generator),
        "reference": HeadStates(*states(HIDDEN + 2)),
    }


def log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reference: HeadStates,
    bias: Tensor | None = None,
    **transform: Any,
) -> TokenDivergence:
    log_p = log_softmax(hidden, weight, bias, **transform)
    log_q = log_softmax(reference.hidden, reference.weight, reference.bias, **transform).detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return TokenDivergence(
        kl, log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1).detach()
    )


def objective(scores: TokenDivergence, kl: float = 1.0, log_probs: float = 1.0) -> Tensor:
    """A sum with weights of both signs."""
    places = torch.arange(len(scores.kl), dtype=scores.kl.dtype)
    total = torch.zeros((), dtype=scores.kl.dtype)
    if kl:
        total = total + kl * (scores.kl * torch.cos(places)).sum()
    if log_probs:
        total = total + log_probs * (scores.log_probs * torch.sin(places + 1)).sum()
    return total


def gradients(scores: TokenDivergence, given: dict[str, Any], **parts: float) -> list[Tensor]:
    wanted = [given[name] for name in TRAINED if given[name] is not None and given[name].requires_grad]
    return list(torch.autograd.grad(objective(scores, **parts), wanted))


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(divergence, "CHUNK_ROWS", rows)


@pytest.mark.parametrize("parts", [(1, 1), (1, 0), (0, 1)], ids=["both", "kl", "log_probs"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_values_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    transform: str,
    bias: bool,
    parts: tuple[float, float],
) -> None:
    """In float64 and float32, whichever of the two outputs the objective uses."""
    chunked(monkeypatch, rows=5)
    given = inputs(dtype, bias=bias)

    found, expected = (score(**given, **TRANSFORMS[transform]) for score in (token_divergence, plain))

    for name, values in found._asdict().items():
        torch.testing.assert_close(
            values, getattr(expected, name), rtol=tolerance, atol=tolerance, msg=name, check_dtype=True
        )
    weights = dict(zip(("kl", "log_probs"), parts, strict=True))
    ours, theirs = (gradients(scores, given, **weights) for scores in (found, expected))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_finite_differences(monkeypatch: pytest.MonkeyPatch, transform: str) -> None:
    chunked(monkeypatch, rows=2)
    given = inputs(count=5)
    trained = tuple(given.pop(name) for name in TRAINED)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = token_divergence(hidden, weight, bias=bias, **given, **TRANSFORMS[transform])
        return scores.kl, scores.log_probs

    assert torch.autograd.gradcheck(function, trained)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_one_head_for_both(monkeypatch: pytest.MonkeyPatch, transform: str) -> None:
    """As below an adapter; only the policy's side of it has a gradient."""
    chunked(monkeypatch, rows=5)
    given = inputs()
    other = draw(torch.Generator().manual_seed(1), torch.float64, COUNT, HIDDEN)
    given["reference"] = HeadStates(other, given["weight"], given["bias"])

    found, expected = (score(**given, **TRANSFORMS[transform]) for score in (token_divergence, plain))

    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_it_is_the_divergence_that_the_losses_define() -> None:
    """Which is written for logits."""
    given = inputs()
    states = given["reference"]
    logits = torch.nn.functional.linear(given["hidden"], given["weight"], given["bias"])[None]
    others = torch.nn.functional.linear(states.hidden, states.weight, states.bias).detach()[None]
    everywhere = torch.ones(1, COUNT, dtype=torch.bool)

    total = token_divergence(**given).kl.sum()
    expected = token_kl(logits, others, everywhere).sum()

    torch.testing.assert_close(total, expected)
    trained = [given[name] for name in TRAINED]
    for ours, theirs in zip(
        torch.autograd.grad(total, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_chunks_are_not_seen_in_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    results = []
    for rows in (COUNT, 1, 4, COUNT - 1, 100):
        chunked(monkeypatch, rows)
        scores = token_divergence(**given, softcap=3.0)
        results.append([*scores, *gradients(scores, given)])

    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_neither_the_entropy_nor_the_reference_carries_a_gradient() -> None:
    given = inputs()
    scores = token_divergence(**given)

    objective(scores).backward()

    assert [values.requires_grad for values in scores] == [True, True, False]
    reference = given["reference"]
    assert reference.hidden.grad is reference.weight.grad is reference.bias.grad is None


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("weight",)])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[str, ...]) -> None:
    given = inputs()
    for name in frozen:
        given[name].requires_grad_(False)

    objective(token_divergence(**given)).backward()

    for name in frozen:
        assert given[name].grad is None
    trained = [name for name in TRAINED if name not in frozen]
    for name, slope in zip(trained, gradients(plain(**given), given), strict=True):
        torch.testing.assert_close(given[name].grad, slope)


def test_a_graph_can_be_gone_through_twice() -> None:
    given = inputs()
    total = objective(token_divergence(**given))

    once, twice = (torch.autograd.grad(total, given["weight"], retain_graph=True)[0] for _ in range(2))

    assert torch.equal(once, twice)


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(count: int) -> None:
    given = inputs(count=count)
    found, expected = token_divergence(**given), plain(**given)

    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (count,)
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(gradients(found, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_policy_that_is_its_own_reference_has_no_divergence_and_no_gradient_of_it(
    dtype: torch.dtype,
) -> None:
    """Exactly, as both go the same way."""
    given = inputs(dtype)
    given["reference"] = HeadStates(*(given[name].detach().clone() for name in TRAINED))

    scores = token_divergence(**given)

    assert not scores.kl.any()
    assert not any(slope.any() for slope in gradients(scores, given, log_probs=0))


def test_logits_far_apart_stay_finite() -> None:
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    reference = HeadStates(torch.tensor([[1.0], [1.0], [0.0]]), weight.detach(), None)

    scores = token_divergence(hidden, weight, torch.tensor([0, 0, 1]), reference)
    (scores.kl + scores.log_probs).sum().backward()

    torch.testing.assert_close(scores.kl, torch.tensor([0.0, 2e4, math.log(3)]))
    assert scores.entropy.tolist() == [0.0, 0.0, 0.0]
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("change", ["positions", "vocabulary"])
def test_states_of_another_batch_or_vocabulary_are_refused(change: str) -> None:
    given = inputs()
    states = given["reference"]
    if change == "positions":
        given["reference"] = HeadStates(states.hidden.repeat(2, 1), states.weight, states.bias)
    else:
        given["reference"] = HeadStates(states.hidden, states.weight[1:], states.bias[1:])

    with pytest.raises(ValueError, match="the reference"):
        token_divergence(**given)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_autocast_products_are_rounded_and_sums_are_not(transform: str) -> None:
    given, exact = inputs(torch.float32), inputs()
    truth = plain(**exact, **TRANSFORMS[transform])
    with torch.autocast("cpu", torch.bfloat16):
        found = token_divergence(**given, **TRANSFORMS[transform])
        same = token_divergence(
            **{**given, "reference": HeadStates(*(given[name] for name in TRAINED))}, **TRANSFORMS[transform]
        )

    assert {values.dtype for values in found} == {torch.float32}
    for ours, right in zip(found, truth, strict=True):
        assert relative(ours.detach().double(), right.detach()) < 0.01
    for ours, right in zip(gradients(found, given), gradients(truth, exact), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours.double(), right) < 0.02
    assert not same.kl.any()


def test_bfloat16_weights_without_autocast() -> None:
    given, exact = inputs(torch.bfloat16), inputs()

    found = token_divergence(**given)

    assert {values.dtype for values in found} == {torch.float32}
    assert relative(found.kl.detach().double(), plain(**exact).kl.detach()) < 0.02
    assert {slope.dtype for slope in gradients(found, given)} == {torch.bfloat16}


def peak(
    count: int, vocabulary: int, width: int, *, shared: bool = False, backward: bool = True, **transform: Any
) -> int:
    """Bytes allocated beyond the inputs, forward and backward; with one head for both where it is shared."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, width, requires_grad=True) for n in (count, vocabulary))
        other = weight if shared else torch.empty(vocabulary, width)
        reference = HeadStates(torch.empty(count, width), other, None)
        targets = torch.zeros(count, dtype=torch.long)
        log = AllocationLog()
        with log:
            log.own([hidden, weight, targets, reference.hidden, reference.weight], "inputs")
            scores = token_divergence(hidden, weight, targets, reference, **transform)
            if backward:
                (scores.kl + scores.log_probs).sum().backward()
    return sum(size for part, size in log.peak().items() if part != "inputs")


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_large_vocabulary_never_lies_there_for_all_positions(transform: str) -> None:
    """Of 512 positions and 150,000 tokens, two tensors of logits would be 614 MB; three of a chunk are 115 MB."""
    count, vocabulary, width = 512, 150_000, 64
    chunk, gradient = divergence.CHUNK_ROWS * vocabulary * 4, vocabulary * width * 4

    found = peak(count, vocabulary, width, **TRANSFORMS[transform])

    assert found < 3 * chunk + gradient + 2**20
    assert found < 2 * count * vocabulary * 4 / 3
    assert peak(count, vocabulary, width, backward=False, **TRANSFORMS[transform]) < 3 * chunk + 2**20
    # What grows with the positions is their own gradients and figures.
    assert peak(8 * count, vocabulary, width, **TRANSFORMS[transform]) - found < 16 * count * (width + 20) * 4


def test_a_head_that_both_have_is_cast_once() -> None:
    """Below an adapter it is the same; its cast is large."""
    count, vocabulary, width = 64, 10_000, 500
    with torch.autocast("cpu", torch.bfloat16):
        both, one = (peak(count, vocabulary, width, shared=shared) for shared in (False, True))

    assert both - one == vocabulary * width * torch.bfloat16.itemsize


# Through models.


def policy_and_reference(family: str) -> tuple[Any, Any]:
    return build(family), build(family, seed=1).eval()


def by_logits(
    model: Any,
    other: Any,
    given: list[Example],
    selected: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """(3, T) divergence, log-probability and entropy per response by the models' own logits, one at a time."""
    most = max(len(example.responses) for example in given)
    found = []
    for branch in range(most):
        for example in (each for each in given if branch < len(each.responses)):
            prompt, response = list(example.prompt), list(example.responses[branch])
            ids = torch.tensor([prompt + response])
            log_p = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            with torch.no_grad(), selected():
                log_q = other(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            rows = slice(max(len(prompt) - 1, 0), -1)
            targets = ids[0, max(len(prompt), 1) :, None]
            log_p, log_q = log_p[rows], log_q[rows]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            found.append(
                torch.stack((kl, log_p.gather(1, targets)[:, 0], -(log_p.exp() * log_p).sum(-1).detach()))
            )
    return found


def scored(
    model: Any,
    other: Any,
    given: list[Example],
    layout: Layout,
    selected: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    for each in (model, other):
        layout.prepare(each)
    batch = layout.batch(given, 0)
    with selected():
        states = reference_states(other, batch, layout)
    return score_samples(model, batch, layout, states)


def require_agreement(scores: Any, expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(each.size(1)) for each in expected], batch_first=True)
    assert torch.equal(scores.mask, mask.bool())
    for number, values in enumerate((scores.kl, scores.log_probs, scores.entropy)):
        assert not values[~scores.mask].any()
        right = torch.cat([each[number] for each in expected])
        assert relative(values[scores.mask].detach(), right.detach()) < tolerance


def slopes(model: Any, kl: Tensor, log_probs: Tensor) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.cos(torch.arange(len(kl), dtype=kl.dtype))
    found = torch.autograd.grad(
        ((kl + 0.5 * log_probs) * weights).sum(), trained, allow_unused=True, materialize_grads=True
    )
    return torch.cat([each.flatten() for each in found])


def require_same_gradients(model: Any, scores: Any, expected: list[Tensor]) -> None:
    joined = torch.cat(expected, dim=1)
    right = slopes(model, joined[0], joined[1])
    found = slopes(model, scores.kl[scores.mask], scores.log_probs[scores.mask])
    assert relative(found, right) < TOLERANCE


CASES = [
    pytest.param(family, layout, id=f"{family}-{layout.way}{'-rows' if layout.width_cost else ''}")
    for family in FAMILIES
    for layout in ([PADDED, ADDITIVE] if family == "gemma2" else [PADDED, PIECES, MASK, ROWS])
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_samples_are_scored_by_the_models_own_logits(family: str, layout: Layout) -> None:
    """In either layout: with it packed and padded agree, too."""
    model, other = policy_and_reference(family)
    given = examples(LENGTHS)
    expected = by_logits(model, other, given)

    scores = scored(model, other, given, layout)

    require_agreement(scores, expected)
    require_same_gradients(model, scores, expected)
    assert torch.cat(expected, dim=1)[0].mean() > 0.01  # else anything would agree
    assert not scores.entropy.requires_grad


@pytest.mark.parametrize("layout", [PIECES, ROWS], ids=["pieces", "rows"])
def test_packed_and_padded_agree_over_random_lengths(layout: Layout) -> None:
    draws = random.Random(0)
    model, other = policy_and_reference("qwen2")
    for seed, count in enumerate([1, 2, 5, 13]):
        given = examples(random_lengths(draws, count), seed)
        expected, found = (scored(model, other, given, each) for each in (PADDED, layout))
        assert torch.equal(found.mask, expected.mask)
        if found.mask.any():
            assert relative(found.kl.detach(), expected.kl.detach()) < 1e-6
            assert relative(found.log_probs.detach(), expected.log_probs.detach()) < 1e-6


def test_their_sums_are_those_of_the_plain_scores() -> None:
    model, other = policy_and_reference("llama")
    given = examples(LENGTHS)
    scores = scored(model, other, given, PIECES)
    plain_scores = score_responses(model, PIECES.batch(given, 0), PIECES)

    torch.testing.assert_close(scores.log_probs.sum(1), plain_scores.logps)
    torch.testing.assert_close(scores.entropy.sum(1), plain_scores.entropy)
    assert torch.equal(scores.mask.sum(1), plain_scores.lengths)


def test_a_batch_without_anything_to_score_has_zeros_and_a_gradient() -> None:
    model, other = policy_and_reference("llama")

    scores = scored(model, other, examples([[0, 1, 1]]), PIECES)
    (scores.kl.sum() + scores.log_probs.sum()).backward()

    assert not scores.mask.any()
    assert not scores.kl.any()
    assert all(parameter.grad is not None for parameter in model.parameters())


def with_adapter(**settings: Any) -> Any:
    model = get_peft_model(build("llama"), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    disturb(model, seed=3)
    return model


def disturb(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "trained-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("layout", [PADDED, PIECES], ids=["padded", "pieces"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_the_adapter_off_the_reference_is_the_original_model(adapter: str, layout: Layout) -> None:
    """Its head too, where the policy trains a copy of it."""
    model, given = with_adapter(**ADAPTERS[adapter]), examples(LENGTHS)
    original = build("llama")
    expected = by_logits(model, original, given)

    scores = scored(model, model, given, layout, model.disable_adapter)

    require_agreement(scores, expected)
    require_same_gradients(model, scores, expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_frozen_copy_of_the_adapter_can_be_the_reference(adapter: str) -> None:
    """As TRL keeps one under the name of ref."""
    settings = LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter])
    model, given = with_adapter(**ADAPTERS[adapter]), examples(LENGTHS)
    model.add_adapter("ref", settings)
    model.set_adapter("ref")
    disturb(model, seed=4)
    other = copy.deepcopy(model)
    model.set_adapter("default")
    expected = by_logits(model, other, given)

    scores = scored(model, model, given, PIECES, lambda: use_adapter(model, "ref"))

    require_agreement(scores, expected)
    require_same_gradients(model, scores, expected)


def test_plain_scores_are_of_the_head_that_is_active() -> None:
    model, original, given = with_adapter(**ADAPTERS["trained-head"]), build("llama"), examples(LENGTHS)
    for each in (model, original):
        PIECES.prepare(each)
    batch = PIECES.batch(given, 0)

    with torch.no_grad():
        adapted = score_responses(model, batch, PIECES).logps
        with model.disable_adapter():
            found = score_responses(model, batch, PIECES).logps
        expected = score_responses(original, batch, PIECES).logps

    assert relative(found, expected) < TOLERANCE
    assert relative(adapted, expected) > 0.01


def test_the_head_itself_goes_along_and_no_copy() -> None:
    """Also under accelerate, which turns every tensor of lower precision that it finds into float32."""
    from accelerate.utils import convert_outputs_to_fp32

    model = build("llama").to(torch.bfloat16)
    PIECES.prepare(model)
    model.forward = convert_outputs_to_fp32(model.forward)

    states = reference_states(model, PIECES.batch(examples(LENGTHS), 0), PIECES)

    assert states.weight is model.lm_head.weight
    assert states.hidden.dtype == torch.bfloat16


def test_the_reference_runs_without_dropout_and_leaves_the_modes_alone() -> None:
    model = build("llama", attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    PIECES.prepare(model)
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    batch = PIECES.batch(examples(LENGTHS), 0)
    recomputed = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, _: recomputed.append(module.training)
    )

    states = [reference_states(model, batch, PIECES).hidden for _ in range(2)]

    assert torch.equal(*states)
    assert recomputed == [False, False]
    assert not states[0].requires_grad
    assert [module.training for module in model.modules()] == modes


def test_a_reference_that_fails_leaves_the_modes_alone() -> None:
    model = build("llama")

    with pytest.raises(KeyError):
        reference_states(model, {}, PADDED)

    assert model.training


def test_a_reference_inside_an_autocast_leaves_the_policy_its_gradients() -> None:
    """Some versions of torch keep the casts of its weights, which have no way back to them."""
    model, given = build("llama"), examples(LENGTHS)
    PIECES.prepare(model)
    batch = PIECES.batch(given, 0)

    with torch.autocast("cpu", torch.bfloat16):
        states = reference_states(model, batch, PIECES)
        scores = score_samples(model, batch, PIECES, states)
    scores.log_probs.sum().backward()

    assert all(parameter.grad is not None for parameter in model.parameters())
    assert scores.kl.max() < 1e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_samples_can_be_scored_without_data(device: Any) -> None:
    """As the memory estimate does; the allocations of the head are entered as such."""
    model, other = policy_and_reference("llama")
    for each in (model, other):
        MASK.prepare(each)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = {name: mode.from_tensor(tensor) for name, tensor in MASK.batch(examples(LENGTHS), 0).items()}
    log = AllocationLog()
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers(), *other.parameters(), *other.buffers()]:
        fake = mode.from_tensor(tensor.detach())
        memo[id(tensor)] = torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake
    with mode:
        policy, frozen = copy.deepcopy(model, memo), copy.deepcopy(other, memo)

    with mode, head_stand_ins(device, log), log:
        states = reference_states(frozen, batch, MASK)
        scores = score_samples(policy, batch, MASK, states)
        log.part = "LM head"
        (scores.kl.sum() + scores.log_probs.sum()).backward()

    assert scores.kl.shape == scores.mask.shape == (12, 11)
    assert log.part == "backward temporaries"
    assert "LM head" in log._parts
    assert head.token_divergence is divergence.token_divergence
