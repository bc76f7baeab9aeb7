"""From a recipe's `training:` to TRL's `DPOConfig`."""

from typing import Any

import torch
from trl import DPOConfig

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import RunFolder


def training_arguments(recipe: Recipe, run: RunFolder, *, evaluates: bool) -> DPOConfig:
    """The recipe's training fields over prefopt's defaults over TRL's.

    prefopt's own defaults: nothing is reported anywhere (``report_to: none``), mixed bfloat16 precision only
    where a GPU supports it, and one evaluation per epoch when there is something to evaluate on.

    Raises:
        UserError: the fields contradict each other; the library's own words are passed on.
    """
    given = recipe.training
    on_gpu = torch.cuda.is_available() and not given.get("use_cpu", False)
    defaults: dict[str, Any] = {
        "report_to": "none",
        "bf16": on_gpu and torch.cuda.is_bf16_supported() and not given.get("fp16", False),
        "dataloader_pin_memory": on_gpu,
        "eval_strategy": "epoch" if evaluates else "no",
    }
    governed: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "beta": getattr(recipe.method, "beta", 0.1),
        # Lengths are settled when the data is tokenised, and batches carry more than the model's inputs.
        "max_length": None,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    try:
        return DPOConfig(**{**defaults, **given, **governed})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
