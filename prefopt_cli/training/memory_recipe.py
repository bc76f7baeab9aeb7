"""The memory of a recipe's run, and of the same recipe with other settings, each different step traced once."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from prefopt_cli.models import loading
from prefopt_cli.models.quantised import stores_few_bits
from prefopt_cli.models.quantising import own_quantization, quantised_start, settled
from prefopt_cli.recipe.schema import LoraAdapter, QuantizationSettings, Recipe
from prefopt_cli.scoring.frozen import BATCH_TOKENS
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.scoring.savings import draw_batches, heaviest_batch
from prefopt_cli.training.engines import sharding_asked
from prefopt_cli.training.extent import prompt_lengths, row_lengths
from prefopt_cli.training.forecast import blank, checkpoints_layers, heaviest_examples, reference_use
from prefopt_cli.training.memory import (
    Device,
    Forward,
    MemoryEstimate,
    Precision,
    Reference,
    Sampling,
    TracedStep,
    of_step,
    trace,
)
from prefopt_cli.training.memory_engines import sharing_of
from prefopt_cli.training.memory_settings import Base
from prefopt_cli.training.memory_step import StepShape
from prefopt_cli.training.objectives import Objective
from prefopt_cli.training.preparation import Prepared, degree_settings, sampling_settings, training_field

UNDER_AN_ADAPTER = LoraAdapter(type="lora")
"""Any will do: weights that are not trained stay in their checkpoint's type."""


class RecipeMemory:
    """Estimates for recipes that read the same data with the same model.

    Args:
        recipe: one of them.
        prepared: what it reads.
        objective: what it trains for.
        layout: of its batches.
        device: where the run is to take place.
        gpus: GPUs that all machines together have; None: those found here.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        objective: Objective,
        layout: Layout,
        device: Device,
        gpus: int | None = None,
    ) -> None:
        self.prepared, self.device, self.gpus = prepared, device, gpus
        self.objective, self._layout = objective, layout
        self._skeletons: dict[str, Any] = {_skeleton_key(recipe): prepared.skeleton}
        self._steps: dict[tuple[Any, ...], TracedStep] = {}
        self._heaviest: dict[int, list[Example]] = {}
        self._evaluated: dict[int, int] = {}

    @property
    def traced(self) -> int:
        """How many steps have been traced so far."""
        return len(self._steps)

    def estimate(self, recipe: Recipe, *, samples: bool = True) -> MemoryEstimate:
        """Of the heaviest batch of an epoch in random order: the run's peak is there or thereabouts.

        Args:
            recipe: with any settings of training, launch, adapter and quantization.
            samples: whether to count those of the policy, where the method has them.
        """
        skeleton = self._skeleton(recipe)
        sampling = heaviest_draw(recipe, self.prepared) if samples else None
        return of_step(
            skeleton,
            self._step(recipe, skeleton, sampling),
            optimizer=training_field(recipe.training, "optim"),
            sharing=sharing_of(recipe, self.gpus),
            sampling=sampling,
            quantization=self.quantization(recipe),
            forward=self._forward(recipe),
        )

    def _skeleton(self, recipe: Recipe) -> Any:
        key = _skeleton_key(recipe)
        if key not in self._skeletons:
            source = replace(self.prepared.source, quantization=self.quantization(recipe))
            self._skeletons[key] = loading.on_meta_device(source, recipe.model, recipe.adapter)
        return self._skeletons[key]

    def quantization(self, recipe: Recipe) -> QuantizationSettings | None:
        """How the base is stored: as the recipe says, or as its folder has it already.

        Raises:
            UserError: such a recipe would be refused; see `quantised_start`.
        """
        source, config = self.prepared.source, self.prepared.config
        start = quantised_start(source, recipe, config, sharding_asked(recipe.launch))
        wanted = recipe.quantization
        if start.quantization is None or not isinstance(wanted, QuantizationSettings):
            return own_quantization(config)
        return settled(wanted, self.device)

    def base(self, recipe: Recipe) -> Base:
        """What `memory_settings` must know of the weights that a recipe starts from."""
        source, config = self.prepared.source, self.prepared.config
        dtype = loading.weights_dtype(recipe.model, UNDER_AN_ADAPTER)
        dtype = (config.dtype or torch.float32) if dtype == loading.CHECKPOINT_DTYPE else dtype
        return Base(
            quantization=self.quantization(recipe),
            may_be_quantised=source.adapter is None and not stores_few_bits(config),
            dtype=str(dtype).removeprefix("torch."),
        )

    def _step(self, recipe: Recipe, skeleton: Any, sampling: Sampling | None) -> TracedStep:
        given = recipe.training
        size = training_field(given, "per_device_train_batch_size")
        accumulation = training_field(given, "gradient_accumulation_steps")
        reference = self._reference(recipe, sampling)
        precision = precision_of(given, self.device)
        checkpointing = checkpoints_layers(given)
        key: tuple[Any, ...] = (
            id(skeleton),
            size,
            accumulation > 1,
            reference,
            precision,
            checkpointing,
            sampling,
        )
        if sampling:
            key += (accumulation,)
        if key not in self._steps:
            shape = StepShape(
                examples=self.heaviest(recipe, size),
                layout=self._layout,
                reference=reference,
                mixed_precision=precision,
                gradient_checkpointing=checkpointing,
                accumulates=accumulation > 1,
                device=self.device,
                samples=sampling.examples(accumulation) if sampling else (),
                kept_positions=sampling.tokens if sampling else 0,
                degrees=degree_settings(recipe),
            )
            self._steps[key] = trace(skeleton, shape)
        return self._steps[key]

    def heaviest(self, recipe: Recipe, size: int) -> list[Example]:
        """The heaviest batch of so many rows."""
        if size not in self._heaviest:
            packed = self._layout.way is not None
            self._heaviest[size] = heaviest_examples(recipe, self.prepared, size, packed=packed)
        return self._heaviest[size]

    def _reference(self, recipe: Recipe, sampling: Sampling | None) -> Reference:
        if reference_use(recipe, self.objective) != "every step" and sampling is None:
            return "none"
        return "adapter_disabled" if isinstance(recipe.adapter, LoraAdapter) else "copy"

    def _forward(self, recipe: Recipe) -> Forward:
        prepared, size = self.prepared, training_field(recipe.training, "per_device_train_batch_size")
        longest = self._positions(self.heaviest(recipe, 1))
        scores = reference_use(recipe, self.objective) == "cached" or prepared.ancestry is not None
        scored = self._positions(self.heaviest(recipe, size))
        if scores:
            sets = (prepared.tokens.train, *prepared.tokens.eval.values())
            everything = sum(int(row_lengths(rows).sum()) for rows in sets)
            scored = max(min(BATCH_TOKENS[self.device], everything), longest)
        return Forward(scored, longest, self._evaluation(recipe), prepared.ancestry is not None)

    def _evaluation(self, recipe: Recipe) -> int:
        """Positions of the heaviest batch of an evaluation; 0 where nothing evaluates."""
        given = recipe.training
        never = given.get("eval_strategy", "epoch") == "no" and not given.get("eval_on_start")
        size = training_field(given, "per_device_eval_batch_size")
        if never or not self.prepared.tokens.eval:
            return 0
        if size not in self._evaluated:
            self._evaluated[size] = max(self._heaviest_of(rows, size) for rows in self._held_out())
        return self._evaluated[size]

    def _held_out(self) -> list[np.ndarray]:
        return [row_lengths(rows) for rows in self.prepared.tokens.eval.values() if len(rows)]

    def _heaviest_of(self, lengths: np.ndarray, size: int) -> int:
        rows = heaviest_batch(draw_batches(lengths, size), packed=self._layout.way is not None)
        return self._positions([blank(row, lengths.shape[1]) for row in rows])

    def _positions(self, examples: list[Example]) -> int:
        return int(self._layout.batch(examples, 0)["input_ids"].numel())


def _skeleton_key(recipe: Recipe) -> str:
    return f"{recipe.adapter!r} {recipe.model.dtype} {recipe.quantization!r}"


def heaviest_draw(recipe: Recipe, prepared: Prepared) -> Sampling | None:
    """The heaviest draw of samples: of the longest prompts, every one running into the limit."""
    regularizer = sampling_settings(recipe)
    if regularizer is None or prepared.sampling is None:
        return None
    lengths = np.sort(prompt_lengths(prepared.sampling.rows))[::-1]
    return Sampling(
        tuple(np.resize(lengths[: regularizer.num_prompts], regularizer.num_prompts).tolist()),
        prepared.sampling.max_new_tokens,
    )


def precision_of(given: dict[str, Any], device: Literal["cpu", "cuda"]) -> Precision:
    """The mixed precision that a recipe's training fields lead to on a device."""
    if given.get("fp16"):
        return "fp16"
    return "bf16" if given.get("bf16", device == "cuda") else "no"
