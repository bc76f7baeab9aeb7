"""What the packed forward pass, the divergence and sampling lean on in transformers, peft, TRL and torch.

When one of these fails after an upgrade, `prefopt_cli/scoring` or `prefopt_cli/training/sampling.py` must follow.
"""

import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx, use_adapter

from prefopt_cli.scoring.attention import BLOCK, PIECES, attention_in_pieces, block_mask
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.sampling import sample_responses
from tests.scoring.build import build, examples, one_by_one, relative

GIVEN = examples([[5, 7, 3], [4, 2, 6]])


def test_the_attention_function_is_registered_with_sdpas_masks() -> None:
    assert AttentionInterface()[PIECES] is attention_in_pieces
    assert ALL_ATTENTION_FUNCTIONS[PIECES] is attention_in_pieces
    assert AttentionMaskInterface()[PIECES] is sdpa_mask


def test_models_hand_the_attention_function_what_it_takes() -> None:
    """By these names; `position_bias` is the one that it refuses."""
    taken = list(inspect.signature(sdpa_attention_forward).parameters)
    assert taken[:5] == ["module", "query", "key", "value", "attention_mask"]
    assert {"is_causal", "position_bias", "dropout", "scaling"} <= set(taken)


@pytest.mark.parametrize("make", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", PIECES])
def test_what_has_four_dimensions_reaches_the_attention_as_it_is(make: Any, attention: str) -> None:
    """A mask, a table of calls, a FlexAttention block mask: for all of them the model has no mask of its own."""
    config = build("mistral", sliding_window=4).config
    config._attn_implementation = attention
    flat = torch.zeros(1, BLOCK, dtype=torch.long)
    for given in (
        torch.ones(1, 1, 6, 6, dtype=torch.bool),
        torch.zeros(1, 1, 6, 6),
        torch.zeros(1, 1, 3, 4, dtype=torch.long),
        block_mask(flat, flat),
    ):
        made = make(
            config=config,
            inputs_embeds=torch.zeros(1, 6, 32),
            attention_mask=given,
            past_key_values=None,
            position_ids=torch.arange(6)[None],
        )
        assert made is given


def test_restarted_positions_without_a_mask_are_a_trap() -> None:
    """transformers reads positions that jump as the borders of independent sequences, unless there is a mask.

    In our rows they jump at every second response, which would then see neither its prompt nor anything else of its
    segment, and nothing would be said about it. So a packed row always comes with something in the mask's place.
    """
    model = build("llama")
    layout = Layout("pieces")
    layout.prepare(model)
    batch = layout.batch(GIVEN, 0)
    assert find_packed_sequence_indices(batch["position_ids"])[0].unique().tolist() == [0, 1, 2, 3]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "predicting", "targets")}

    with torch.no_grad():
        right = model(**inputs, attention_mask=batch["calls"][None, None]).log_probs
        trapped = model(**inputs).log_probs
        places = torch.arange(len(right))
        expected = one_by_one(model, GIVEN)

    first = batch["slots"][:2][
        batch["slots"][:2] < len(right)
    ]  # first responses stand right behind their prompts
    later = places[~torch.isin(places, first)]
    torch.testing.assert_close(trapped[first], right[first], rtol=1e-4, atol=1e-4)
    assert (trapped[later] - right[later]).abs().max() > 1
    assert relative(right.sum(), expected.sum()) < 1e-5


def test_trls_kernel_takes_its_arguments_in_the_order_they_are_given() -> None:
    """An autograd function takes no names, so a new argument in between would be taken for another."""
    assert list(inspect.signature(ChunkedLogProbFunction.forward).parameters) == [
        "ctx",
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ]


def test_trls_kernel_returns_five_tensors_in_their_order() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    targets = torch.tensor([0, 1, 2, 3])
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")

    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 2, 2.0, 0.5, outputs)

    logits = 2.0 * torch.tanh(hidden @ weight.t() * 0.5 / 2.0)
    log_probs = logits.log_softmax(-1)
    log_prob, entropy, squares, mean_logits, top1 = found
    torch.testing.assert_close(log_prob, log_probs[torch.arange(4), targets])
    torch.testing.assert_close(entropy, -(log_probs.exp() * log_probs).sum(-1))
    assert squares is None
    torch.testing.assert_close(mean_logits, logits.mean(-1))
    assert torch.equal(top1, logits.argmax(-1) == targets)


def test_trl_gathers_a_head_by_its_parameters() -> None:
    assert [each.kind for each in inspect.signature(maybe_gather_lm_head_ctx).parameters.values()] == [
        inspect.Parameter.VAR_POSITIONAL
    ]


def test_trls_fused_head_and_ours_are_put_on_in_either_order() -> None:
    for order in ((0, 1), (1, 0)):
        model = build("llama")
        heads = (Layout().prepare, add_fused_lm_head)
        for number in order:
            heads[number](model)
        batch = Layout().batch(GIVEN, 0)
        shared = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

        ours = model(**shared, predicting=batch["predicting"], targets=batch["targets"]).log_probs
        theirs = model(**shared, labels=labels, fused_lm_head=True).log_probs

        torch.testing.assert_close(ours.sum(), theirs.sum())


def test_models_can_be_asked_whether_their_attention_may_be_set() -> None:
    assert LlamaForCausalLM._can_set_attn_implementation()
    assert GPT2LMHeadModel._can_set_attn_implementation()
    assert isinstance(PreTrainedModel._supports_flex_attn, bool)
    assert LlamaForCausalLM._supports_flex_attn
    assert build("mamba", state_size=8, head_dim=16)._is_stateful
    assert not build("llama")._is_stateful


def test_peft_shows_the_attributes_of_the_head_that_is_active() -> None:
    """A head that is trained beside an adapter stands in the model several times; the one that runs is scored."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(build("llama"), config)
    model.add_adapter("ref", config)
    wrapper = model.get_base_model().get_output_embeddings()
    copies = wrapper.modules_to_save

    assert wrapper.weight is copies["default"].weight
    with use_adapter(model, "ref"):
        assert wrapper.weight is copies["ref"].weight
    with use_adapter(model, None):
        assert wrapper.weight is wrapper.original_module.weight
    assert wrapper.weight is copies["default"].weight
    assert wrapper.weight.requires_grad
    assert not copies["ref"].weight.requires_grad


def test_generation_is_left_with_nothing_that_shapes_the_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library fills in what nobody has set (its top_k is 50); such a default must be named in `sampling`."""
    model = build("llama")
    found: list[Any] = []

    def drawn(_: Any, input_ids: Tensor, logits_processor: Any, **__: Any) -> Tensor:
        found.append(logits_processor)
        return input_ids

    monkeypatch.setattr(type(model), "_sample", drawn)

    sample_responses(model, [[4, 5], [6]], max_new_tokens=3, stop_ids=[2], padding_id=0, seed=0)

    assert found == [[]]
