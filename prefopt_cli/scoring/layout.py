"""Packed or padded: which layout a model's batches have, and why.

A model that cannot take a tree-shaped mask keeps padded rows. Where nothing speaks against packing, the first
batch is scored both ways, and packing is given up when the two disagree.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.scoring.attention import PIECES, Way
from prefopt_cli.scoring.batches import packed_batch, padded_batch
from prefopt_cli.scoring.forward import plain_model, score_responses
from prefopt_cli.scoring.head import add_response_head
from prefopt_cli.scoring.packing import Example

Requested = Literal["auto", "packed", "padded"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted difference between packed and padded, in nats per token of a response, by type of the products."""

PROBE_TOKENS = 8192
"""Padded tokens of the batch that is scored both ways, at most, beyond its first two examples."""


@dataclass(frozen=True)
class Layout:
    """How batches are laid out."""

    way: Way | None = None
    """How attention is told of the packing; None stands for padded rows."""
    mask_dtype: torch.dtype | None = None
    """Type of an additive mask, where the attention takes no boolean one."""
    width_cost: float = 0.0
    """Cost of attention per key as a share of all else per token; see `packing.rows_for_masks`."""
    note: str = ""
    """One line for the user: which layout, and why."""

    def batch(
        self, examples: Sequence[Example], padding_id: int, multiple: int | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a batch; see `batches`."""
        if self.way is None:
            return padded_batch(examples, padding_id, multiple or 1)
        return packed_batch(examples, self.way, padding_id, multiple or 1, self.width_cost)

    def prepare(self, model: nn.Module) -> None:
        """Give a model the head, and the attention implementation that this layout needs."""
        plain = plain_model(model)
        add_response_head(plain)
        wanted = {"pieces": PIECES, "blocks": "flex_attention"}.get(self.way or "")
        if wanted and plain.config._attn_implementation != wanted:
            plain.set_attn_implementation(wanted)
        elif self.way is None and plain.config._attn_implementation == PIECES:
            plain.set_attn_implementation("sdpa")


def choose_layout(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    longest: int,
    requested: Requested = "auto",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    router_loss: bool = False,
) -> Layout:
    """The layout for a model and its data; the model is prepared for it.

    Args:
        model: the policy with its weights, peft's wrapper or not, on the device that it will run on.
        examples: the first batch; it is scored both ways.
        longest: tokens of the longest prompt + response of all data.
        requested: the recipe's ``training.attention_layout``.
        autocast: the precision that the model will run in.
        router_loss: whether a mixture of experts is to be trained with its load-balancing loss.

    Raises:
        UserError: ``packed`` was requested, and the model cannot be packed.
        PrefoptError: the head of the model is of a kind not known here.
    """
    if requested == "padded":
        return _prepared(Layout(note="Layout: padded rows, as the recipe asks."), model)
    reason = unsuited(plain_model(model), longest=longest, router_loss=router_loss)
    for layout in [] if reason else _packed_layouts(model):
        reason, difference = _disagreement(model, layout, _probe(examples), autocast)
        if not reason:
            note = (
                "Layout: packed, every prompt once and no padding "
                f"({WAYS[layout.way]}; within {difference:.0e} nats per token of padded rows)."
            )
            return Layout(layout.way, layout.mask_dtype, layout.width_cost, note)
    if requested == "packed":
        raise UserError(
            f"training.attention_layout: packed is not possible, because {reason}. Use auto or padded."
        )
    return _prepared(Layout(note=f"Layout: padded rows, because {reason}."), model)


WAYS: Mapping[Way | None, str] = {
    "pieces": "attention in pieces",
    "blocks": "FlexAttention",
    "mask": "masked attention",
}


def _prepared(layout: Layout, model: nn.Module) -> Layout:
    layout.prepare(model)
    return layout


def unsuited(model: Any, *, longest: int, router_loss: bool = False) -> str | None:
    """Why a model cannot be packed, as far as its configuration tells; None where nothing speaks against it.

    Args:
        model: a causal language model, without peft's wrapper; its weights are not looked at.
        longest: tokens of the longest prompt + response.
        router_loss: whether the load-balancing loss of a mixture of experts is wanted.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(model, "_is_stateful", False):
        what = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"the model has layers that no mask separates{what}"
    window = _window(config)
    if window is not None and window < longest:
        return f"the model sees {window} tokens back and the longest sequence has {longest}"
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager", "flex_attention", PIECES, None):
        return f"attn_implementation {attention} takes no mask of this kind"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "the model derives its positions (ALiBi) from the mask"
    if hasattr(config, "attention_layers"):
        return "the model adds masks of its own (local attention, a limit on the row's length)"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "the model takes no position_ids"
    if router_loss:
        return "the load-balancing loss of its experts counts every prompt twice"
    return None


def _window(config: Any) -> int | None:
    """Tokens that a layer with a sliding window sees, where the model has such layers."""
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or "sliding_attention" in kinds else None


def _packed_layouts(model: nn.Module) -> list[Layout]:
    """Ways that may work for this model on its device, the best one first."""
    plain = plain_model(model)
    device, attention = plain.device.type, plain.config._attn_implementation
    changeable = attention in ("sdpa", PIECES, "flex_attention") and plain._can_set_attn_implementation()
    mask = Layout(
        "mask",
        mask_dtype=plain.dtype if attention == "eager" else None,
        width_cost=1 / (6 * plain.config.get_text_config().hidden_size),
    )
    if changeable and device == "cuda" and getattr(plain, "_supports_flex_attn", False):
        return [Layout("blocks"), mask]
    if changeable and device == "cpu":
        return [Layout("pieces"), mask]
    return [mask]


def _probe(examples: Sequence[Example]) -> list[Example]:
    """The examples that are scored both ways.

    Only later tokens of a second response tell whether it sees the first one, so there is always such a response.
    """
    chosen = list(examples[:2])
    for example in examples[2:]:
        widest = max(each.longest for each in (*chosen, example))
        if widest * sum(len(each.responses) for each in (*chosen, example)) > PROBE_TOKENS:
            break
        chosen.append(example)
    if all(len(response) < 2 for example in chosen for response in example.responses[1:]):
        longest = max(chosen, key=lambda example: example.longest)
        text = [*longest.prompt, *max(longest.responses, key=len)]
        chosen.append(Example([], (text, text)))
    return chosen


def _disagreement(
    model: nn.Module,
    layout: Layout,
    examples: Sequence[Example],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[str | None, float]:
    """What speaks against a layout after scoring the examples both ways, and the largest difference per token."""
    plain = plain_model(model)
    before, training = plain.config._attn_implementation, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            add_response_head(plain)
            padded = score_responses(model, _on(plain, Layout().batch(examples, 0)), Layout())
            _require_known_head(model, examples)
            try:
                layout.prepare(model)
                packed = score_responses(model, _on(plain, layout.batch(examples, 0)), layout)
                leaks = _leaks(model, layout, examples, packed.logps)
            except PrefoptError:
                raise
            except Exception as error:  # any code may be in a model, and any of it may refuse the mask
                words = " ".join(str(error).split())[:200]
                return f"the model does not take the packed input ({type(error).__name__}: {words})", 0.0
        dtype = torch.get_autocast_dtype(plain.device.type) if _is_autocast(autocast, plain) else plain.dtype
        difference = float(((packed.logps - padded.logps).abs() / padded.lengths.clamp(min=1)).max())
        tolerance = TOLERANCE.get(dtype, 5e-2)
        if not difference <= tolerance:
            return (
                f"packed and padded log-probabilities of the first batch differ by {difference:.1e} nats per token "
                f"(accepted: {tolerance:.0e})"
            ), difference
        if leaks:
            return "the score of a response depends on the other response to its prompt", difference
        before = plain.config._attn_implementation
        return None, difference
    finally:
        if plain.config._attn_implementation != before:
            plain.set_attn_implementation(before)
        model.train(training)


def _leaks(model: nn.Module, layout: Layout, examples: Sequence[Example], logps: Tensor) -> bool:
    """Whether a response's score moves when the first response to its prompt, of the same length, is another.

    Where a response sees its prompt and itself only it cannot, in any precision; agreement with padded rows is
    asked only up to rounding, which in bfloat16 hides much.
    """
    others = [
        Example(each.prompt, ([max(token, 2) - 1 for token in each.responses[0]], *each.responses[1:]))
        for each in examples
    ]
    changed = score_responses(model, _on(plain_model(model), layout.batch(others, 0)), layout).logps
    later = slice(len(examples), None)  # response-major: the first responses come first
    # Experts work on the tokens that they are given together, so that there rounding moves.
    experts = hasattr(plain_model(model).config.get_text_config(), "output_router_logits")
    return not torch.allclose(changed[later], logps[later], rtol=1e-3 if experts else 1e-6, atol=1e-5)


def _require_known_head(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse a model whose own logits differ from those that the head here computes.

    Raises:
        PrefoptError: it puts something on its logits that is not known here.
    """
    plain = plain_model(model)
    singles = [Example(each.prompt, each.responses[:1]) for each in examples]
    scored = [single for single in singles if single.longest > 1]
    if not scored:
        return
    shortest = min(scored, key=lambda single: single.longest)
    batch = _on(plain, Layout().batch([shortest], 0))
    count = int(batch["targets"].numel())
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    log_probs = logits[0, batch["predicting"]].float().log_softmax(-1)
    expected = log_probs.gather(1, batch["targets"][:, None]).sum()
    got = score_responses(model, batch, Layout()).logps[0]
    reduced = torch.is_autocast_enabled(plain.device.type) or plain.dtype.itemsize < 4
    if not abs(float(got - expected)) / count < (0.1 if reduced else 1e-2):
        raise PrefoptError(
            f"{type(plain).__name__} computes its logits in a way that prefopt does not know: its log-probability of "
            f"a response is {float(expected):.3f}, the one from its hidden states {float(got):.3f}."
        )


def _is_autocast(autocast: Callable[[], AbstractContextManager[Any]], plain: Any) -> bool:
    with autocast():
        return torch.is_autocast_enabled(plain.device.type)


def _on(plain: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(plain.device) for name, tensor in batch.items()}
