"""Packed or padded: which layout a model's batches get, and why.

A model that cannot take a tree-shaped mask keeps padded rows. Where nothing speaks against packing, the first
batch is scored both ways (`trial`), and packing is given up when the two disagree.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from prefopt_cli.errors import UserError
from prefopt_cli.scoring.attention import PIECES, Way
from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.scoring.trial import disagreement

Requested = Literal["auto", "packed", "padded"]

WAYS: Mapping[Way | None, str] = {
    "pieces": "attention in pieces",
    "blocks": "FlexAttention",
    "mask": "masked attention",
}


def choose_layout(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    longest: int,
    requested: Requested = "auto",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    router_loss: bool = False,
    neftune: bool = False,
) -> Layout:
    """The layout for a model and its data; the model is prepared for it.

    Args:
        model: the policy with its weights, peft's wrapper or not, on the device that it will run on.
        examples: the first batch; it is scored both ways.
        longest: tokens of the longest prompt + response of all data.
        requested: the recipe's ``training.attention_layout``.
        autocast: the precision that the model will run in.
        router_loss: whether a mixture of experts is to be trained with its load-balancing loss.
        neftune: whether noise is added to the embeddings in training.

    Raises:
        UserError: ``packed`` was requested, and the model cannot be packed.
        PrefoptError: the head of the model is of a kind not known here.
    """
    if requested == "padded":
        return _prepared(Layout(note="Layout: padded rows, as the recipe asks."), model)
    plain = plain_model(model)
    reason = unsuited(plain, longest=longest, router_loss=router_loss, neftune=neftune)
    for layout in [] if reason else packed_layouts(plain, plain.device.type):
        reason, difference = disagreement(model, layout, examples, autocast)
        if not reason:
            note = (
                "Layout: packed, every prompt once and no padding "
                f"({WAYS[layout.way]}; within {difference:.0e} nats per token of padded rows)."
            )
            return replace(layout, note=note)
    require_choice(requested, reason)
    return _prepared(Layout(note=f"Layout: padded rows, because {reason}."), model)


def require_choice(requested: Requested, reason: str | None) -> None:
    """Refuse to pad where packing was insisted on.

    Raises:
        UserError: there is a reason against packing, and ``packed`` was requested.
    """
    if reason and requested == "packed":
        raise UserError(
            f"training.attention_layout: packed is not possible, because {reason}. Use auto or padded."
        )


def _prepared(layout: Layout, model: nn.Module) -> Layout:
    layout.prepare(model)
    return layout


def unsuited(model: Any, *, longest: int, router_loss: bool = False, neftune: bool = False) -> str | None:
    """Why a model cannot be packed, as far as its configuration tells; None where nothing speaks against it.

    Args:
        model: a causal language model, without peft's wrapper; its weights are not looked at.
        longest: tokens of the longest prompt + response.
        router_loss: whether the load-balancing loss of a mixture of experts is wanted.
        neftune: whether noise is added to the embeddings in training.
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
    if neftune:
        return "training.neftune_noise_alpha scales its noise by the length of a row"
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


def packed_layouts(plain: Any, device: str) -> list[Layout]:
    """Ways that may work for a model on a type of device, the best one first.

    Args:
        plain: a causal language model, without peft's wrapper; its weights are not looked at.
        device: where it will run: cpu, cuda, ...
    """
    attention = plain.config._attn_implementation
    changeable = (
        attention in ("sdpa", PIECES, "flex_attention", None) and plain._can_set_attn_implementation()
    )
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


def wants_router_loss(config: Any, coefficient: float | None) -> bool:
    """Whether a model is trained with a load-balancing loss of its experts.

    Args:
        config: the model's configuration.
        coefficient: the recipe's ``training.router_aux_loss_coef``; None leaves it to the model.
    """
    text = config.get_text_config()
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    return hasattr(text, "output_router_logits") and bool(coefficient)


def scores_depend_on_batch(config: Any, longest: int) -> bool:
    """Whether a response's score depends on what else is in its batch, so that it cannot be known beforehand.

    Rotary embeddings of the types `longrope` and `dynamic` change with the longest sequence of a batch, once one is
    longer than those that the model was first trained on.

    Args:
        config: the model's configuration.
        longest: tokens of the longest prompt + response.
    """
    text = config.get_text_config()
    settings = getattr(text, "rope_parameters", None) or {}
    kinds = [settings] if "rope_type" in settings else [each for each in settings.values() if each]
    for kind in kinds:
        if isinstance(kind, Mapping) and kind.get("rope_type") in ("longrope", "dynamic"):
            limit = kind.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            if longest > (limit or text.max_position_embeddings):
                return True
    return False
