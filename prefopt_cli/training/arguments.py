"""From a recipe's `training:` to TRL's `DPOConfig`."""

from contextlib import suppress
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
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
    if (given.get("bf16") or given.get("fp16")) and not (on_gpu or given.get("use_cpu")):
        half = "bf16" if given.get("bf16") else "fp16"
        raise UserError(
            f"training.{half}: this machine has no GPU to use it on. Set training.{half}=false to train here "
            "(`prefopt check --device cuda` judges the recipe for a machine that has one)."
        )
    defaults: dict[str, Any] = {
        "report_to": "none",
        "bf16": on_gpu and torch.cuda.is_bf16_supported() and not given.get("fp16", False),
        "dataloader_pin_memory": on_gpu,
        "eval_strategy": "epoch" if evaluates else "no",
    }
    governed: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "beta": getattr(recipe.method.alignment, "beta", 0.1),
        # Lengths are settled when the data is tokenised, and batches carry more than the model's inputs.
        "max_length": None,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        # The scores of the reference come from the cache or from a pass in every step, never from TRL's own pass.
        "precompute_ref_log_probs": False,
    }
    given = {name: value for name, value in given.items() if name != "attention_layout"}
    try:
        args = DPOConfig(**{**defaults, **given, **governed})
        _try_optimizer(args)
    except (ValueError, TypeError, ImportError) as error:
        words = " ".join(str(error).split()).removeprefix("No package metadata was found for ")
        raise UserError(f"training: {words}") from error
    _require_integrations(args)
    _require_devices(args)
    return args


def _try_optimizer(args: DPOConfig) -> None:
    """Judge now what the library judges only when training starts: the optimizer's package, the schedule's settings."""
    with suppress(ValueError):  # some optimizers want to see the model, which is not there yet
        Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)


def _require_integrations(args: DPOConfig) -> None:
    """Refuse to report to what is not installed."""
    missing = sorted({*args.report_to} - {*get_available_reporting_integrations(), "flyte"})
    if missing:
        raise UserError(
            f"training.report_to: {', '.join(missing)} is not installed. Run `pip install {' '.join(missing)}`, or "
            "write report_to: none."
        )


def _require_devices(args: DPOConfig) -> None:
    """Refuse what needs other devices than this process sees."""
    if args.activation_offloading and args.device.type == "cpu":
        raise UserError("training.activation_offloading: needs a GPU; set it to false.")
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, which can use one. Train on all of them with "
            "launch.processes=auto, or name one, as in CUDA_VISIBLE_DEVICES=0 prefopt train ..."
        )
