"""Packed rows give the log-probabilities and gradients of padded ones, and these are those of the model's logits.

Agreement is measured by norms: that of the difference over that of what is expected, for the vector of all
log-probabilities and for the gradient of every parameter; a gradient that is all but nothing beside the others (queries
that see one key) counts as a thousandth of the largest. Tiny models have weights so large that attention matters;
what a wrong mask does is in here too, four orders of magnitude above the tolerance.
"""

import copy
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from prefopt_cli.errors import UserError
from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from tests.scoring.build import (
    FAMILIES,
    LONGEST,
    build,
    examples,
    logps_and_gradients,
    one_by_one,
    random_lengths,
    relative,
)

TOLERANCE = 1e-5
PADDED = Layout()
PIECES = Layout("pieces")
MASK = Layout("mask")
ROWS = Layout("mask", width_cost=1.0)
"""Attention so dear that there are several rows."""
ADDITIVE = Layout("mask", mask_dtype=torch.float32, width_cost=1.0)

LENGTHS = [[5, 7, 3], [0, 4, 6], [8, 1, 9], [3, 1, 1], [0, 1, 5], [2, 11, 2], [1, 2, 2]]
"""Empty prompts, responses of one token, a response of which nothing is scored."""


def disagreement(model: Any, given: list[Example], layout: Layout) -> tuple[float, float]:
    """Relative differences of log-probabilities, and the largest of a parameter's gradients, to padded rows."""
    expected, slopes = logps_and_gradients(model, given, PADDED)
    found, gradients = logps_and_gradients(model, given, layout)
    return relative(found, expected), largest_difference(gradients, slopes)


def largest_difference(gradients: dict[str, Tensor], slopes: dict[str, Tensor]) -> float:
    assert gradients.keys() == slopes.keys()
    floor = 1e-3 * max(slope.norm() for slope in slopes.values())
    return max(
        float((gradients[name] - slope).norm() / torch.maximum(slope.norm(), floor))
        for name, slope in slopes.items()
    )


def require_agreement(model: Any, given: list[Example], layout: Layout, tolerance: float = TOLERANCE) -> None:
    logps, gradients = disagreement(model, given, layout)
    assert logps < tolerance
    assert gradients < tolerance


def layouts_of(family: str) -> list[Layout]:
    return [ADDITIVE] if family == "gemma2" else [PIECES, MASK, ROWS]


CASES = [
    pytest.param(family, layout, id=f"{family}-{layout.way}{'-rows' if layout.width_cost else ''}")
    for family in FAMILIES
    for layout in layouts_of(family)
]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_give_the_log_probabilities_of_the_models_own_logits(family: str) -> None:
    model, given = build(family), examples(LENGTHS)
    expected = one_by_one(model, given).detach()

    found, _ = logps_and_gradients(model, given, PADDED)

    assert relative(found, expected) < TOLERANCE
    assert expected.std() > 5  # with other weights anything would agree


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_packed_and_padded_agree(family: str, layout: Layout, lora: bool) -> None:
    require_agreement(build(family, lora=lora), examples(LENGTHS), layout)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", PIECES), ("gemma2", ADDITIVE), ("gpt2", PIECES), ("qwen2", ROWS), ("gemma", PIECES)],
)
def test_they_agree_under_gradient_checkpointing(
    family: str, layout: Layout, lora: bool, reentrant: bool
) -> None:
    """Against padded rows without checkpointing."""
    model, given = build(family, lora=lora), examples(LENGTHS)
    expected, slopes = logps_and_gradients(model, given, PADDED)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    recomputed = count_calls(model)

    found, gradients = logps_and_gradients(model, given, layout)

    assert recomputed() == 2
    assert relative(found, expected) < TOLERANCE
    assert largest_difference(gradients, slopes) < TOLERANCE


def count_calls(model: Any) -> Any:
    """Calls of the first layer's MLP from now on."""
    calls: list[None] = []
    layer = next(module for name, module in model.named_modules() if name.endswith(".0.mlp"))
    layer.register_forward_pre_hook(lambda *_: calls.append(None))
    return lambda: len(calls)


@pytest.mark.parametrize("layout", [PIECES, ROWS], ids=["pieces", "rows"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_they_agree_over_random_lengths(family: str, layout: Layout) -> None:
    """One to four responses a prompt, in one example or many."""
    draw = random.Random(family)
    model = build(family)
    for seed, count in enumerate([1, 1, 2, 3, 5, 8, 13]):
        given = examples(random_lengths(draw, count), seed)
        if any(len(e.prompt) or len(r) > 1 for e in given for r in e.responses):
            require_agreement(model, given, layout)


@pytest.mark.parametrize("layout", [PIECES, MASK, ROWS], ids=["pieces", "mask", "rows"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_in_float64_they_agree_to_the_last_digits(family: str, layout: Layout) -> None:
    """So what is left in float32 is rounding. (Other families go through float32 in their norms.)"""
    model = build(family).double()

    require_agreement(model, examples([*LENGTHS, [3, 2, 4, 1, 5, 6]]), layout, 1e-12)


@pytest.mark.parametrize("layout", [PIECES, MASK, ROWS], ids=["pieces", "mask", "rows"])
def test_lists_of_differing_numbers_of_responses(layout: Layout) -> None:
    given = examples([[4, 3, 1, 5], [0, 2, 2, 3, 4, 6], [7, 1], [2, 5, 5, 5, 1]])
    model = build("llama")

    logps, _ = logps_and_gradients(model, given, layout)

    assert logps.shape == (13,)
    assert relative(logps, one_by_one(model, given).detach()) < TOLERANCE
    require_agreement(model, given, layout)


@pytest.mark.parametrize("layout", [PIECES, ROWS], ids=["pieces", "rows"])
def test_padding_at_the_end_of_a_row_changes_nothing(layout: Layout) -> None:
    """Also where a model has no more positions than its longest sequence is long."""
    model = build("gpt2", n_positions=20)
    layout.prepare(model)
    given = examples([[10, 10, 10], [1, 2, 1]])

    plain = score_responses(model, layout.batch(given, 0), layout)
    filled = score_responses(model, layout.batch(given, 0, multiple=64), layout)

    assert layout.batch(given, 0, multiple=64)["input_ids"].size(1) == 64
    assert relative(filled.logps.detach(), plain.logps.detach()) < TOLERANCE


@pytest.mark.parametrize("layout", [PADDED, PIECES, ROWS], ids=["padded", "pieces", "rows"])
def test_a_batch_without_anything_to_score_has_zeros_and_a_gradient(layout: Layout) -> None:
    """A step may meet such pairs, and every process must go backward."""
    model = build("llama")

    logps, gradients = logps_and_gradients(model, examples([[0, 1, 1]]), layout)

    assert logps.tolist() == [0, 0]
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("layout", [PIECES, ROWS], ids=["pieces", "rows"])
def test_the_other_figures_agree_too(layout: Layout) -> None:
    model, given = build("qwen2"), examples(random_lengths(random.Random(0), 30))
    results = []
    for each in (PADDED, layout):
        each.prepare(model)
        results.append(score_responses(model, each.batch(given, 0), each))

    expected, found = results
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.top1, expected.top1)
    assert 0 < found.top1.sum() < found.lengths.sum()
    torch.testing.assert_close(found.entropy, expected.entropy)
    torch.testing.assert_close(found.mean_logits, expected.mean_logits, rtol=1e-4, atol=1e-4)
    assert not found.entropy.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_see_the_others(family: str) -> None:
    """Other words in the chosen response leave the rejected one where it was, bit for bit."""
    layout = layouts_of(family)[0]
    model = build(family)
    layout.prepare(model)
    given = examples([[4, 6, 5], [3, 2, 2]])
    chosen, rejected = given[0].responses
    changed = [Example(given[0].prompt, [chosen[::-1], rejected]), given[1]]

    with torch.no_grad():
        before, after = (score_responses(model, layout.batch(e, 0), layout).logps for e in (given, changed))

    assert torch.equal(before[1:], after[1:])
    assert before[0] != after[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_mask_over_the_row_would_be_noticed(family: str) -> None:
    """If responses saw all that lies before them, differences were far above the tolerance."""
    model, given = build(family), examples(LENGTHS)
    expected, _ = logps_and_gradients(model, given, PADDED)
    wrong = ADDITIVE if family == "gemma2" else MASK
    batch = wrong.batch(given, 0)
    batch["segments"], batch["branches"] = (torch.zeros_like(batch[n]) for n in ("segments", "branches"))

    found = score_responses(model, batch, wrong).logps.detach()

    assert relative(found, expected) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_run_on_would_be_noticed(family: str) -> None:
    model, given = build(family), examples(LENGTHS)
    expected, _ = logps_and_gradients(model, given, PADDED)
    layout = layouts_of(family)[0]
    layout.prepare(model)
    batch = layout.batch(given, 0)
    batch["position_ids"] = torch.arange(batch["position_ids"].numel()).view_as(batch["position_ids"])
    batch["position_ids"] %= LONGEST

    found = score_responses(model, batch, layout).logps.detach()

    assert relative(found, expected) > 0.001


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_under_bfloat16_autocast_packed_is_as_exact_as_padded(family: str, layout: Layout) -> None:
    """Both round on their way; neither errs more than a little against float32."""
    model, given = build(family), examples(LENGTHS)
    expected, slopes = logps_and_gradients(model, given, PADDED)
    errors = []
    for each in (PADDED, layout):
        with torch.autocast("cpu", torch.bfloat16):
            logps, gradients = logps_and_gradients(model, given, each)
        assert logps.dtype == torch.float32
        whole = [torch.cat([g.flatten() for g in all_of.values()]) for all_of in (gradients, slopes)]
        errors.append((relative(logps, expected), relative(*whole)))

    padded, packed = errors
    assert packed[0] < max(0.03, 2 * padded[0])
    assert packed[1] < max(0.1, 2 * padded[1])


def test_attention_dropout_reaches_the_pieces() -> None:
    model, given = build("llama", attention_dropout=0.5), examples(LENGTHS)
    PIECES.prepare(model)
    batch = PIECES.batch(given, 0)

    torch.manual_seed(0)
    first, second = (score_responses(model.train(), batch, PIECES).logps for _ in range(2))
    model.eval()
    still = [score_responses(model, batch, PIECES).logps for _ in range(2)]

    assert not torch.equal(first, second)
    assert torch.equal(*still)


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own() -> None:
    """A frozen reference policy is such a copy."""
    model, given = build("llama"), examples(LENGTHS)
    before, _ = logps_and_gradients(model, given, PIECES)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    found = score_responses(twin, PIECES.batch(given, 0), PIECES).logps

    assert torch.equal(found.detach(), before)
    assert relative(one_by_one(twin, given).detach(), before) < TOLERANCE


def test_a_head_that_is_trained_beside_an_adapter_is_the_one_that_is_scored() -> None:
    """peft puts a copy in its place."""
    given = examples(LENGTHS)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(build("llama"), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = one_by_one(model, given)
    weights = torch.cos(torch.arange(len(expected)))
    slopes = torch.autograd.grad((expected * weights).sum(), trained)

    for layout in (PADDED, PIECES):
        found, gradients = logps_and_gradients(model, given, layout)
        assert relative(found, expected.detach()) < TOLERANCE
        for gradient, slope in zip(gradients.values(), slopes, strict=True):
            assert relative(gradient, slope) < TOLERANCE


def test_a_low_rank_sum_on_the_head_is_refused() -> None:
    """It would be neither scored nor trained, and nothing in the figures would tell."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    model = get_peft_model(build("llama"), config)

    with pytest.raises(UserError, match="head"):
        PADDED.prepare(model)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_load_balancing_loss_comes_from_trls_head(autocast: bool) -> None:
    """And the log-probabilities beside it are those of this house's head."""
    model = build("mixtral", num_local_experts=4, num_experts_per_tok=2)
    given = examples(LENGTHS)
    PADDED.prepare(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    batch = PADDED.batch(given, 0)

    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        plain = score_responses(model, batch, PADDED)
        routed = score_responses(model, batch, PADDED, router_logits=True)
        own = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        )

    assert plain.router_loss is None
    assert routed.router_loss is not None
    torch.testing.assert_close(routed.router_loss, own.aux_loss)
    torch.testing.assert_close(routed.logps, plain.logps, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(routed.entropy, plain.entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(routed.mean_logits, plain.mean_logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(routed.top1, plain.top1)
    assert torch.equal(routed.lengths, plain.lengths)
