"""A method's trainer, from a recipe, its data and its policy."""

import copy
from pathlib import Path
from typing import Any

from trl import DPOConfig

from prefopt_cli.models import loading
from prefopt_cli.models.adapters import stack_adapter
from prefopt_cli.recipe.schema import LoraAdapter, Recipe
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.engines import is_sharded, reshard, shard
from prefopt_cli.training.objectives import Objective
from prefopt_cli.training.preparation import Prepared
from prefopt_cli.training.trainer import REFERENCE_COLUMNS, PreferenceTrainer


def build_trainer(
    recipe: Recipe,
    prepared: Prepared,
    model: Any,
    args: DPOConfig,
    objective: Objective,
    card: str,
    layout: Layout | None = None,
    samples_file: Path | None = None,
) -> PreferenceTrainer:
    """The method's trainer, with a reference policy where one is asked while training; it may choose the layout."""
    scored = set(REFERENCE_COLUMNS) <= set(prepared.tokens.train.column_names)
    reshard(model)
    # An adapter needs no second model: the reference is the model without it, or with a frozen copy of it.
    copies = not (scored or objective.reference == "none" or isinstance(recipe.adapter, LoraAdapter))
    sampling: dict[str, Any] = {}
    if objective.reference == "samples":
        sampling = {
            "sampling": prepared.sampling,
            "stop_ids": prepared.tokens.stop_ids,
            "samples_file": samples_file,
        }
    new_adapter = loading.new_adapter(prepared.source, recipe.adapter)
    if prepared.stacked and isinstance(recipe.adapter, LoraAdapter):  # which TRL would not add to another
        model = stack_adapter(model, loading.adapter_config(recipe.adapter), args.seed)
    return objective.trainer(
        **objective.arguments,
        model=model,
        ref_model=_frozen_copy(model, recipe, prepared, args) if copies else None,
        args=args,
        train_dataset=prepared.tokens.train,
        eval_dataset=prepared.tokens.eval,
        processing_class=prepared.tokenizer,
        peft_config=new_adapter,
        card=card,
        layout=layout,
        **sampling,
    )


def _frozen_copy(model: Any, recipe: Recipe, prepared: Prepared, args: DPOConfig) -> Any:
    """The reference beside the policy; one that is taken apart cannot be copied, and is loaded once more."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    again = loading.load_model(prepared.source, recipe.model, recipe.adapter, device=args.device)
    return shard(again, args).requires_grad_(False)
