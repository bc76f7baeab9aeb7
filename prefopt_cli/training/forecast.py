"""How a recipe's batches will be laid out, how large they will be and what that saves, without any weights."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.scoring.choice import packed_layouts, require_choice, unsuited, wants_router_loss
from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.head import KEPT_BYTES
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.scoring.savings import (
    Device,
    ModelWork,
    Savings,
    Unscored,
    draw_batches,
    heaviest_batch,
    predict_savings,
)
from prefopt_cli.training.degree_extent import expected_versions, longest_versions, versions_in
from prefopt_cli.training.extent import row_lengths
from prefopt_cli.training.objectives import Objective, precomputes
from prefopt_cli.training.preparation import Prepared, degree_settings, training_field

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Packing(Savings):
    """What `prefopt check` tells of the batches."""

    packed: bool
    """The expected layout; training settles it on its first batch, which is scored both ways."""
    reason: str | None
    """Why it will be padded."""
    reference: Literal["cached", "every step", "samples", "none"]
    """When the reference policy scores the data: before training or in every step; else what else it is for."""
    heaviest_tokens: int
    """Positions of the heaviest batch, in the expected layout; the memory estimate is of that one."""


@dataclass(frozen=True)
class Forecast:
    """The expected layout, and what follows from it and the data."""

    packing: Packing
    layout: Layout
    heaviest: list[Example]
    """The heaviest batch of an epoch in random order, each response with as many and as long degraded versions as may
    be drawn; the tokens themselves are zeros."""


def forecast(recipe: Recipe, objective: Objective, prepared: Prepared, device: Device) -> Forecast:
    """Look ahead.

    Raises:
        UserError: the recipe insists on packing, and the model cannot be packed.
    """
    given = recipe.training
    model = plain_model(prepared.skeleton)
    reason = padding_reason(recipe, prepared)
    layout = Layout() if reason else packed_layouts(model, device)[0]
    lengths = row_lengths(prepared.tokens.train)
    size = training_field(given, "per_device_train_batch_size")
    batches, unscored = draw_batches(lengths, size), None
    if degrees := degree_settings(recipe):
        versions = versions_in(prepared.tokens.train), len(lengths), degrees.levels_per_step
        unscored = Unscored(*(draw_batches(each, size) for each in expected_versions(*versions)))
    reference = reference_use(recipe, objective)
    savings = predict_savings(
        batches,
        model_work(prepared.skeleton, checkpointing=checkpoints_layers(given)),
        packed=not reason,
        cached=reference != "every step",
        device=device,
        kept=KEPT_BYTES // (FLOAT32_BYTES * _head(model).size(0)) if device == "cpu" else 0,
        unscored=unscored,
    )
    heaviest = heaviest_examples(recipe, prepared, size, packed=not reason)
    packing = Packing(
        **vars(savings),
        packed=not reason,
        reason=reason,
        reference=reference,
        heaviest_tokens=layout.batch(heaviest, 0)["input_ids"].numel(),
    )
    return Forecast(packing, layout, heaviest)


def heaviest_examples(recipe: Recipe, prepared: Prepared, size: int, *, packed: bool) -> list[Example]:
    """See `Forecast.heaviest`; of batches of so many rows, in either layout."""
    lengths = heavy = row_lengths(prepared.tokens.train)
    if degrees := degree_settings(recipe):
        versions = versions_in(prepared.tokens.train), len(lengths), degrees.levels_per_step
        heavy = np.hstack((lengths, longest_versions(*versions)))
    rows = heaviest_batch(draw_batches(heavy, size), packed=packed)
    return [blank(row, lengths.shape[1]) for row in rows]


def padding_reason(recipe: Recipe, prepared: Prepared) -> str | None:
    """Why rows will be padded, as far as the configuration tells; None where they will be packed.

    Raises:
        UserError: the recipe insists on packing, and the model cannot be packed.
    """
    given = recipe.training
    requested = training_field(given, "attention_layout")
    if requested == "padded":
        return "the recipe asks for them"
    model = plain_model(prepared.skeleton)
    reason = unsuited(
        model,
        longest=max(prepared.longest, prepared.sampling.longest if prepared.sampling else 0),
        router_loss=wants_router_loss(model.config, training_field(given, "router_aux_loss_coef")),
        neftune=training_field(given, "neftune_noise_alpha") is not None,
    )
    require_choice(requested, reason)
    return reason


def reference_use(recipe: Recipe, objective: Objective) -> Literal["cached", "every step", "samples", "none"]:
    """When and for what the reference policy is run."""
    if objective.reference != "data":
        return objective.reference
    return "cached" if precomputes(recipe, objective) else "every step"


def model_work(model: Any, *, checkpointing: bool) -> ModelWork:
    """Count a model's weights by what they do.

    Args:
        model: a causal language model, peft's wrapper or not, on any device.
        checkpointing: whether its layers are computed again in backward.
    """
    plain = plain_model(model)
    weights = dict.fromkeys(
        weight
        for name, module in plain.base_model.named_modules()
        if not isinstance(module, nn.Embedding) and not name.endswith("original_module")
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1
    )
    head = _head(plain)
    text = plain.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 0  # a state-space model has none, some have a list of them
    size = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    return ModelWork(
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        frozen=sum(weight.numel() for weight in weights if not weight.requires_grad),
        head=head.numel(),
        head_is_trained=head.requires_grad,
        attention=text.num_hidden_layers * heads * size,
        checkpointing=checkpointing,
    )


def checkpoints_layers(given: dict[str, Any]) -> bool:
    """Whether training computes the layers again in backward."""
    return bool(given.get("activation_checkpointing", training_field(given, "gradient_checkpointing")))


def _head(model: Any) -> Any:
    """(V, H) weights of the language-model head."""
    return model.get_output_embeddings().weight


def blank(lengths: np.ndarray, scored: int) -> Example:
    """An example whose tokens are zeros.

    Args:
        lengths: (1 + R + U,) of the prompt, of its responses, and of the texts that are not scored; 0 for none.
        scored: 1 + R.
    """
    prompt, *responses = (np.zeros(length, dtype=np.int64) for length in lengths[:scored])
    unscored = [np.zeros(length, dtype=np.int64) for length in lengths[scored:] if length]
    return Example(prompt, [response for response in responses if len(response)], unscored)
