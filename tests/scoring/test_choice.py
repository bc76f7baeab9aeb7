"""Which models are packed, which are not and why, and that trying leaves them as they were."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.scoring.attention import PIECES
from prefopt_cli.scoring.choice import choose_layout, scores_depend_on_batch
from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from tests.scoring.build import FAMILIES, build, examples, one_by_one, relative

GIVEN = examples([[5, 7, 3], [0, 4, 6], [8, 1, 9], [3, 1, 1]])
MOST = max(example.longest for example in GIVEN)


def choose(model: Any, **options: Any) -> Layout:
    return choose_layout(model, GIVEN, **{"longest": MOST, **options})


def scores(model: Any, layout: Layout) -> Tensor:
    with torch.no_grad():
        return score_responses(model, layout.batch(GIVEN, 0), layout).logps


def require_right(model: Any, layout: Layout) -> None:
    """The layout gives what the model's own logits say, one response at a time."""
    with torch.no_grad():
        assert relative(scores(model, layout), one_by_one(model, GIVEN)) < 1e-5


# What is packed


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_packed(family: str, lora: bool) -> None:
    model = build(family, lora=lora)

    layout = choose(model)

    assert layout.way == ("mask" if family == "gemma2" else "pieces")
    assert layout.note.startswith("Layout: packed, every prompt once and no padding (")
    assert "within" in layout.note
    require_right(model, layout)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_eager_attention_keeps_to_eager_with_an_additive_mask(family: str) -> None:
    """Who asks for eager has a reason, so it is not changed."""
    model = build(family, attn_implementation="eager")

    layout = choose(model)

    assert (layout.way, layout.mask_dtype) == ("mask", torch.float32)
    assert "masked attention" in layout.note
    assert model.config._attn_implementation == "eager"
    require_right(model, layout)


def test_bfloat16_weights_and_autocast() -> None:
    half, cast = build("llama").bfloat16(), build("llama")

    assert choose(half).way == "pieces"
    assert choose(cast, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).way == "pieces"
    assert choose(build("llama", attn_implementation="eager").bfloat16()).mask_dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gemma2", "qwen2"])
def test_a_window_as_long_as_the_longest_sequence_is_none(family: str) -> None:
    changes: dict[str, Any] = {"use_sliding_window": True} if family == "qwen2" else {}
    model = build(family, sliding_window=MOST, **changes)

    layout = choose(model)

    assert layout.way is not None
    require_right(model, layout)


def test_a_window_that_is_switched_off_is_none() -> None:
    model = build("qwen2", sliding_window=3, use_sliding_window=False)

    assert choose(model).way == "pieces"
    require_right(model, choose(model))


def test_a_mixture_of_experts_is_packed_unless_its_experts_are_balanced() -> None:
    plain, balanced = (build("mixtral", num_local_experts=4, num_experts_per_tok=2) for _ in range(2))

    packed, padded = choose(plain, router_loss=False), choose(balanced, router_loss=True)

    assert packed.way == "pieces"
    assert padded.way is None
    assert "counts every prompt twice" in padded.note
    require_right(plain, packed)
    require_right(balanced, padded)


# What is not, by its configuration


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "qwen2"])
def test_a_shorter_window_means_padded_rows(family: str) -> None:
    """A window counts places in the row, and in a packed row others lie in between."""
    changes: dict[str, Any] = (
        {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    )
    model = build(family, sliding_window=MOST - 1, **changes)

    layout = choose(model)

    assert layout.way is None
    assert f"sees {MOST - 1} tokens back and the longest sequence has {MOST}" in layout.note
    require_right(model, layout)


UNSUITED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 8, "head_dim": 16}, "layers that no mask separates"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "ALiBi|position_ids"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi|position_ids"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 64},
        "masks of its own",
    ),
    "qwen3_next": (
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "linear_attention",
    ),
}


@pytest.mark.parametrize("family", UNSUITED)
def test_models_without_a_mask_for_trees_keep_padded_rows(family: str) -> None:
    changes, reason = UNSUITED[family]
    model = build(family, **changes)

    layout = choose(model)

    assert layout.way is None
    assert layout.note.startswith("Layout: padded rows, because ")
    assert any(each in layout.note for each in reason.split("|")), layout.note
    # Other state-space models compute rows in blocks, so they are only nearly the same.
    with torch.no_grad():
        assert relative(scores(model, layout), one_by_one(model, GIVEN)) < 1e-4


# What is not, by its numbers


@pytest.fixture(scope="module")
def deaf_attention() -> str:
    """An attention function that pays no heed to the mask, as some kernels do."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **{**rest, "is_causal": True})

    AttentionInterface.register("deaf", attention)
    AttentionMaskInterface.register("deaf", sdpa_mask)
    return "deaf"


class DeafLlama(LlamaForCausalLM):
    """Drops every mask; right for rows that are padded at their end."""

    def forward(self, *args: Any, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, position_ids=position_ids, attention_mask=attention_mask, **kwargs)

    @property
    def base_model(self) -> Any:
        backbone = super().base_model
        return lambda *args, attention_mask=None, **rest: backbone(*args, **{**rest, "position_ids": None})


class StrictLlama(LlamaForCausalLM):
    """Takes masks of rows and columns only, and is written so that nothing else can be set."""

    @property
    def base_model(self) -> Any:
        backbone = super().base_model

        def forward(*args: Any, attention_mask: Any = None, **rest: Any) -> Any:
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError("this model takes\na 2D mask")
            return backbone(*args, attention_mask=attention_mask, **rest)

        return forward


class LoudLlama(LlamaForCausalLM):
    """Its logits are twice what its head makes of the hidden states, which no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def turned_into(kind: type, **changes: Any) -> Any:
    model = build("llama", **changes)
    model.__class__ = kind
    return model


def test_a_model_that_ignores_the_mask_is_found_out_by_its_numbers() -> None:
    model = turned_into(DeafLlama)

    layout = choose(model)

    assert layout.way is None
    assert "packed and padded log-probabilities of the first batch differ by" in layout.note
    assert "(accepted: 2e-05)" in layout.note
    require_right(model, layout)


@pytest.mark.parametrize("lengths", [[[3, 1, 1]], [[0, 1, 1], [5, 9, 1]], [[4, 6]]])
def test_it_is_found_out_even_where_the_first_batch_would_not_tell(lengths: list[list[int]]) -> None:
    """The first token of a response is predicted by the prompt alone; what later ones see is what matters."""
    layout = choose_layout(turned_into(DeafLlama), examples(lengths), longest=MOST)

    assert "differ by" in layout.note


def test_it_is_found_out_where_rounding_hides_it_from_the_numbers() -> None:
    """In bfloat16, with small weights, what a response wrongly sees moves its score by less than rounding may."""
    model = turned_into(DeafLlama, initializer_range=0.02)

    layout = choose(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))

    assert "depends on the other response to its prompt" in layout.note


def test_of_a_large_first_batch_a_part_is_scored_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = Layout.batch

    def noted(self: Layout, given: Any, *rest: Any) -> Any:
        seen.append(len(given))
        return whole(self, given, *rest)

    monkeypatch.setattr(Layout, "batch", noted)
    monkeypatch.setattr("prefopt_cli.scoring.trial.PROBE_TOKENS", 200)

    assert choose_layout(build("llama"), examples([[5, 7, 3]] * 50), longest=12).way == "pieces"

    assert max(seen) == 200 // 24


def test_an_attention_function_of_someone_else_is_not_tried(deaf_attention: str) -> None:
    model = build("llama", attn_implementation=deaf_attention)

    layout = choose(model)

    assert layout.way is None
    assert "attn_implementation deaf takes no mask of this kind" in layout.note
    assert model.config._attn_implementation == deaf_attention


def test_what_a_model_says_against_the_mask_is_passed_on() -> None:
    model = turned_into(StrictLlama)

    layout = choose(model)

    assert layout.way is None
    assert "the model does not take the packed input (ValueError: this model takes a 2D mask)" in layout.note
    require_right(model, layout)


@pytest.mark.parametrize(
    ("kind", "reason"), [(DeafLlama, "differ by"), (StrictLlama, "a 2D mask"), (None, "sees 4 tokens back")]
)
def test_who_insists_on_packing_is_told_why_not(kind: type | None, reason: str) -> None:
    model = turned_into(kind) if kind else build("mistral", sliding_window=4)

    with pytest.raises(
        UserError, match=f"attention_layout: packed is not possible.*{reason}.*auto or padded"
    ):
        choose(model, requested="packed")

    assert model.config._attn_implementation == "sdpa"


def test_who_insists_on_packing_gets_it_where_it_works() -> None:
    assert choose(build("llama"), requested="packed").way == "pieces"


def test_padded_rows_are_to_be_had_for_the_asking() -> None:
    model = build("llama")

    layout = choose(model, requested="padded")

    assert layout.way is None
    assert layout.note == "Layout: padded rows, as the recipe asks."
    assert model.config._attn_implementation == "sdpa"
    require_right(model, layout)


@pytest.mark.parametrize("weights", [0.3, 0.02], ids=["large", "usual"])
def test_logits_of_an_unknown_kind_are_refused(weights: float) -> None:
    """Also where the model is so even that the difference is small."""
    model = turned_into(LoudLlama, initializer_range=weights)

    with pytest.raises(
        PrefoptError, match="LoudLlama computes its logits in a way that prefopt does not know"
    ):
        choose(model)


def test_unknown_logits_are_noticed_where_the_shortest_response_has_nothing_to_score() -> None:
    given = examples([[0, 1, 1], [5, 7, 3]])

    with pytest.raises(PrefoptError, match="does not know"):
        choose_layout(turned_into(LoudLlama), given, longest=MOST)
    choose_layout(build("llama"), given, longest=MOST)
    choose_layout(build("llama"), given[:1], longest=MOST)


def test_a_model_without_a_backbone_is_refused() -> None:
    model = build(
        "llama4_text",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        attention_chunk_size=64,
        no_rope_layers=[1, 0],
    )

    with pytest.raises(PrefoptError, match="Llama4ForCausalLM is not split into a backbone and a head"):
        choose(model)


@pytest.mark.parametrize("weights", [0.3, 0.02], ids=["large", "usual"])
def test_no_known_model_is_refused_for_its_rounding(weights: float) -> None:
    for family in FAMILIES:
        choose(build(family, initializer_range=weights).bfloat16())
        choose(
            build(family, initializer_range=weights), autocast=lambda: torch.autocast("cpu", torch.bfloat16)
        )


# What trying leaves behind


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, DeafLlama, StrictLlama])
def test_trying_leaves_the_model_as_it_was(kind: type, training: bool) -> None:
    model = turned_into(kind).train(training)
    next(iter(model.parameters())).requires_grad_(False)
    weights = copy.deepcopy(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]

    layout = choose(model)

    assert {module.training for module in model.modules()} == {training}
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == ("sdpa" if layout.way is None else PIECES)


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model = turned_into(LoudLlama)

    with pytest.raises(PrefoptError):
        choose(model)

    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_a_second_choice_is_the_first_one_again() -> None:
    model = build("llama")

    first = choose(model)
    second = choose(model)
    padded = choose(model, requested="padded")

    assert first.way == second.way == "pieces"
    assert padded.way is None
    assert model.config._attn_implementation == "sdpa"
    require_right(model, padded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_model_is_used_like_any_other(family: str) -> None:
    """Plain loss, padding on either side, generation from a batch, and what is saved."""
    untouched = build(family).eval()
    model = copy.deepcopy(untouched)
    assert choose(model).way is not None
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :4] = right[1, -3:] = 0
    ask = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 59}

    with torch.no_grad():
        for mask in (None, left, right):
            ours, theirs = (
                each(input_ids=ids, attention_mask=mask, labels=ids) for each in (model, untouched)
            )
            torch.testing.assert_close(ours.loss, theirs.loss)
            seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
            torch.testing.assert_close(ours.logits[seen], theirs.logits[seen], rtol=1e-4, atol=1e-4)
        ours, theirs = (
            each.generate(input_ids=ids * left, attention_mask=left, **ask) for each in (model, untouched)
        )
    assert torch.equal(ours, theirs)


def test_a_prepared_model_is_saved_like_any_other(tmp_path: Any) -> None:
    """Whoever loads it has no attention function of ours."""
    model = build("llama")
    choose(model)

    model.save_pretrained(tmp_path)

    assert PIECES not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "longest", "depends"), [("dynamic", 40, True), ("dynamic", 32, False), ("default", 40, False)]
)
def test_scores_that_depend_on_the_batch_are_known_as_such(kind: str, longest: int, depends: bool) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)

    assert scores_depend_on_batch(config, longest) is depends
