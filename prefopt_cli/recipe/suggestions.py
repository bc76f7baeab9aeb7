"""The nearest valid name: among the keys of the section, of other sections, and among old names."""

import difflib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from prefopt_cli.recipe.problems import Path, dotted, join_names, through_align
from prefopt_cli.recipe.schema import (
    ALIGNMENTS,
    METHODS,
    DatasetSettings,
    LaunchSettings,
    LoraAdapter,
    ModelSettings,
    QuantizationSettings,
    Recipe,
    Regularizer,
    Section,
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
    "load_in_4bit": "quantization.bits",
    "load_in_8bit": "quantization.bits",
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_quant_storage": "quantization.storage_dtype",
    "llm_int8_threshold": "quantization.threshold",
    "llm_int8_skip_modules": "quantization.skip_modules",
    "quantization_bit": "quantization.bits",
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
    "nproc_per_node": "launch.processes",
    "num_machines": "launch.machines",
    "nnodes": "launch.machines",
    "node_rank": "launch.machine_rank",
    "main_process_ip": "launch.rendezvous",
    "rdzv_endpoint": "launch.rendezvous",
    "deepspeed": "launch.engine",
    "fsdp": "launch.engine",
}
"""Names that other tools and older versions use, and the key that does it here."""

SELF_SUPERVISED_ALIASES = {
    "gamma": "method.ssl_coef",
    "ssl_weight": "method.ssl_coef",
    "num_levels": "method.levels",
    "head_lr": "method.head_learning_rate",
    "stop_words": "method.stopwords",
}
"""Such names in a recipe of self_supervised."""

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


class Named(NamedTuple):
    """What a recipe's method section names, as far as it is known."""

    method: str | None = None
    align: str | None = None


@lru_cache(maxsize=8)
def _owners(named: Named) -> dict[str, list[str]]:
    """The sections (dotted) in which each key is valid, for a recipe of this method (None: of any)."""
    sections: dict[str, Iterable[str]] = {
        "": Recipe.model_fields,
        "model": ModelSettings.model_fields,
        "adapter": LoraAdapter.model_fields,
        "dataset": DatasetSettings.model_fields,
        "dataset.train.0": Source.model_fields,
        "method": _keys(named.method, METHODS),
        "training": allowed_fields(),
        "quantization": QuantizationSettings.model_fields,
        "launch": LaunchSettings.model_fields,
    }
    if named.method == "self_supervised":
        sections["method.align"] = _keys(named.align, ALIGNMENTS)
    for place in [place for place, keys in sections.items() if "regularizer" in keys]:
        sections[f"{place}.regularizer"] = Regularizer.model_fields
        sections[f"{place}.mu"] = Weighting.model_fields
    owners: dict[str, list[str]] = {}
    for section, keys in sections.items():
        for key in keys:
            owners.setdefault(key, []).append(f"{section}.{key}".lstrip("."))
    return owners


def _keys(name: str | None, known: Mapping[str, type[Section]]) -> list[str]:
    """The keys of the method of this name, of all where it is not known."""
    methods = [known[name]] if name is not None and name in known else known.values()
    return list(dict.fromkeys(key for each in methods for key in each.model_fields))


def siblings(path: Path, named: Named) -> list[str]:
    """The valid keys beside the last one of ``path``."""
    section = ".".join(str(part) for part in path[:-1])
    if path[:2] == ("dataset", "train") or path[:2] == ("dataset", "eval"):
        section = "dataset.train.0" if len(path) > 2 else "dataset"
    if through_align(path)[:3] == ("method", "regularizer", "prompts") and len(through_align(path)) > 3:
        section = "dataset.train.0"
    places = ((full.rpartition("."), key) for key, fulls in _owners(named).items() for full in fulls)
    return [key for (owner, _, _), key in places if owner == section]


def _key_of_the_method(name: str, path: Path, named: Named) -> str | None:
    """What to say about a key beside a method's or an alignment loss's own that others of them have."""
    section: Path = ("method",)
    known: Mapping[str, type[Section]] = METHODS
    judged = named.method
    if named.method == "self_supervised":
        places = [place for place in _owners(named).get(name, ()) if place.startswith("method.")]
        if name in SELF_SUPERVISED_ALIASES:
            places.append(SELF_SUPERVISED_ALIASES[name])
        if places:
            return f"unknown key; did you mean {join_names(places)}?"
        section, known, judged = ("method", "align"), ALIGNMENTS, named.align
    others = [each for each, settings in known.items() if name in settings.model_fields]
    if not others:
        return None
    valid = ", ".join(key for key in siblings((*section, name), named) if key != "name")
    here = "here" if path[:-1] == section else f"in {dotted(section)}"
    return f"unknown key; {dotted(section)} {join_names(others)} has it, {judged} does not; valid {here}: {valid}"


def unknown_key(path: Path, named: Named) -> str:
    """What to say about a key that does not exist: where it belongs, or what it may have meant.

    Args:
        path: of the key.
        named: the recipe's method, and its alignment loss.
    """
    name, beside, owners = str(path[-1]), siblings(path, named), _owners(named)
    if path[:-1] in (("method",), ("method", "align")):
        told = _key_of_the_method(name, path, named)
        if told:
            return told
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
