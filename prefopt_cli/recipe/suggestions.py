"""The nearest valid name: among the keys of the section, of other sections, and among old names."""

import difflib
from collections.abc import Iterable
from functools import lru_cache

from prefopt_cli.recipe.problems import Path, join_names
from prefopt_cli.recipe.schema import (
    METHODS,
    DatasetSettings,
    LaunchSettings,
    LoraAdapter,
    ModelSettings,
    Recipe,
    Regularizer,
    Source,
    Weighting,
)
from prefopt_cli.recipe.training_settings import allowed_fields, governed

ALIASES = {
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "use_peft": "adapter",
    "peft": "adapter",
    "lora": "adapter",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "lora_target_modules": "adapter.target_modules",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "data": "dataset",
    "datasets": "dataset",
    "dataset_name": "dataset.train",
    "train_dataset": "dataset.train",
    "eval_dataset": "dataset.eval",
    "max_seq_length": "dataset.max_length",
    "max_seq_len": "dataset.max_length",
    "max_prompt_length": "dataset.max_length",
    "max_samples": "dataset.train.0.limit",
    "trainer": "training",
    "training_args": "training",
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "lr_scheduler": "training.lr_scheduler_type",
    "scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps (a value below 1 is a share of all steps)",
    "evaluation_strategy": "training.eval_strategy",
    "no_cuda": "training.use_cpu",
    "num_processes": "launch.processes",
}
"""Names that other tools and older versions use, and the key that does it here."""

LOSS_ALIASES = {
    "dpo": "'logistic'",
    "sigmoid": "'logistic'",
    "ipo": "'squared', with `length_normalize: true` for TRL's form of IPO",
    "slic": "'hinge'",
    "exp": "'exponential'",
    "mse": "'squared'",
}


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name most like ``name``, or None where none is alike."""
    lowered = {candidate.lower(): candidate for candidate in names}
    written = name.lower()[:80]
    found = difflib.get_close_matches(written, lowered, n=1, cutoff=0.8)
    if not found and len(written) > 2:  # an abbreviation: adamw for adamw_torch
        found = [candidate for candidate in lowered if candidate.startswith(written)]
    found = found or difflib.get_close_matches(written, lowered, n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None


@lru_cache(maxsize=8)
def _owners(method: str | None) -> dict[str, list[str]]:
    """The sections (dotted) in which each key is valid, for a recipe of this method (None: of any)."""
    methods = [METHODS[method]] if method in METHODS else METHODS.values()
    sections: dict[str, Iterable[str]] = {
        "": Recipe.model_fields,
        "model": ModelSettings.model_fields,
        "adapter": LoraAdapter.model_fields,
        "dataset": DatasetSettings.model_fields,
        "dataset.train.0": Source.model_fields,
        "method": dict.fromkeys(key for each in methods for key in each.model_fields),
        "training": allowed_fields(),
        "launch": LaunchSettings.model_fields,
    }
    if "regularizer" in sections["method"]:
        sections["method.regularizer"] = Regularizer.model_fields
        sections["method.mu"] = Weighting.model_fields
    owners: dict[str, list[str]] = {}
    for section, keys in sections.items():
        for key in keys:
            owners.setdefault(key, []).append(f"{section}.{key}".lstrip("."))
    return owners


def siblings(path: Path, method: str | None = None) -> list[str]:
    """The valid keys beside the last one of ``path``."""
    section = ".".join(str(part) for part in path[:-1])
    if path[:2] == ("dataset", "train") or path[:2] == ("dataset", "eval"):
        section = "dataset.train.0" if len(path) > 2 else "dataset"
    if path[:3] == ("method", "regularizer", "prompts") and len(path) > 3:
        section = "dataset.train.0"
    places = ((full.rpartition("."), key) for key, fulls in _owners(method).items() for full in fulls)
    return [key for (owner, _, _), key in places if owner == section]


def unknown_key(path: Path, method: str | None = None) -> str:
    """What to say about a key that does not exist: where it belongs, or what it may have meant.

    Args:
        path: of the key.
        method: the recipe's method, as far as it is known.
    """
    name, beside, owners = str(path[-1]), siblings(path, method), _owners(method)
    others = [each for each, settings in METHODS.items() if name in settings.model_fields]
    if path[:-1] == ("method",) and others:
        valid = ", ".join(key for key in beside if key != "name")
        return f"unknown key; method {join_names(others)} has it, {method} does not; valid here: {valid}"
    pointer = governed(name)
    if pointer:
        return f"unknown key; {pointer}"
    if name in owners:
        return f"unknown key; it belongs elsewhere: {join_names(owners[name])}"
    close = nearest(name, beside)
    if name in ALIASES:
        return f"unknown key; did you mean {ALIASES[name]}?"
    if close:
        return f"unknown key; did you mean {close!r}?"
    far = nearest(name, owners, cutoff=0.8)
    if far:
        return f"unknown key; did you mean {join_names(owners[far])}?"
    if 0 < len(beside) <= 20:
        return f"unknown key; valid here: {', '.join(beside)}"
    return "unknown key; see `prefopt recipe schema` for the valid ones"
