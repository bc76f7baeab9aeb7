"""Which training fields a recipe may set, and the check of their values."""

import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefopt_cli.recipe.problems import join_names, join_types
from prefopt_cli.recipe.training_fields import TrainingField, training_fields

_OTHER_LOSSES = "belongs to losses of TRL's own DPOTrainer; the methods here have no use for it"
_FROZEN_REFERENCE = "the reference policy is frozen here"
_DECIDED = "decided by prefopt, which makes the batches itself"
_COMMANDS = "`prefopt train` trains, and evaluates as training.eval_strategy says"
_ENGINES = "sharded training is not available in this version; several processes train by DDP"
_UPLOAD = "prefopt does not upload while it trains; afterwards run `hf upload REPO RUN/model`"

GOVERNED: dict[str, str] = {
    "beta": "write it as method.beta (method gpo), or method.align.beta (self_supervised)",
    "loss_type": "write it as method.loss (method gpo), or method.align.loss (self_supervised)",
    "loss_weights": _OTHER_LOSSES,
    "label_smoothing": _OTHER_LOSSES,
    "ld_alpha": _OTHER_LOSSES,
    "f_divergence_type": _OTHER_LOSSES,
    "f_alpha_divergence_coef": _OTHER_LOSSES,
    "use_weighting": _OTHER_LOSSES,
    "discopop_tau": _OTHER_LOSSES,
    "label_smoothing_factor": "smooths class labels, which preferences do not have",
    "output_dir": "write output_dir at the top level",
    "max_length": "write it as dataset.max_length",
    "truncation_mode": "write it as dataset.on_overflow (drop, truncate_response or error)",
    "model_init_kwargs": "write its entries under model: dtype, attn_implementation, revision",
    "trust_remote_code": "write it as model.trust_remote_code",
    "pad_token": "set it in the tokenizer that lies beside the model",
    "padding_free": _DECIDED,
    "remove_unused_columns": _DECIDED,
    "label_names": _DECIDED,
    "include_num_input_tokens_seen": "metrics.jsonl always has num_tokens, without padding",
    "include_for_metrics": "decided by prefopt, which computes the metrics itself",
    "batch_eval_metrics": "decided by prefopt, which computes the metrics itself",
    "use_liger_kernel": "prefopt computes the language-model head itself, which these kernels replace",
    "length_column_name": _DECIDED,
    "auto_find_batch_size": "it would change the batch size unseen; set training.per_device_train_batch_size",
    "logging_nan_inf_filter": "always off: a loss that is not finite stops the run",
    "sync_ref_model": _FROZEN_REFERENCE,
    "ref_model_mixup_alpha": _FROZEN_REFERENCE,
    "ref_model_sync_steps": _FROZEN_REFERENCE,
    "resume_from_checkpoint": "run `prefopt train RECIPE --resume`",
    "do_train": _COMMANDS,
    "do_eval": _COMMANDS,
    "do_predict": _COMMANDS,
    "push_to_hub": _UPLOAD,
    "disable_tqdm": "prefopt shows its own progress",
    "fsdp": _ENGINES,
    "fsdp_config": _ENGINES,
    "deepspeed": _ENGINES,
    "local_rank": "the launcher sets it",
    "parallelism_config": "a Python object, which YAML cannot express",
}
"""Fields of DPOConfig that a recipe sets elsewhere or not at all, and where to turn instead."""

REPORT_TO = (
    "none",
    "all",
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "comet_ml",
    "clearml",
    "codecarbon",
    "dvclive",
    "flyte",
    "kubeflow",
    "neptune",
    "swanlab",
    "azure_ml",
    "dagshub",
)
_LOG_LEVEL = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
_REPORT: Any = Literal[REPORT_TO]

TYPES: dict[str, Any] = {
    "log_level": _LOG_LEVEL,
    "log_level_replica": _LOG_LEVEL,
    "report_to": _REPORT | list[_REPORT] | None,
    "pad_to_multiple_of": int | Literal["auto"] | None,
    "train_sampling_strategy": Literal["random", "sequential"],
}
"""Types narrower than the annotation: values that fail only deep inside a run."""

_POSITIVE_INT = Field(ge=1)
_POSITIVE = Field(gt=0)
_NOT_NEGATIVE = Field(ge=0)
_SHARE = Field(ge=0, lt=1)
_SEED = Field(ge=0, lt=2**32)

RANGES: dict[str, Any] = {
    "per_device_train_batch_size": _POSITIVE_INT,
    "per_device_eval_batch_size": _POSITIVE_INT,
    "gradient_accumulation_steps": _POSITIVE_INT,
    "eval_accumulation_steps": _POSITIVE_INT,
    "save_total_limit": _POSITIVE_INT,
    "dataset_num_proc": _POSITIVE_INT,
    "precompute_ref_batch_size": _POSITIVE_INT,
    "torch_empty_cache_steps": _POSITIVE_INT,
    "dataloader_prefetch_factor": _POSITIVE_INT,
    "ddp_timeout": _POSITIVE_INT,
    "num_train_epochs": _POSITIVE,
    "adam_epsilon": _POSITIVE,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "learning_rate": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "eval_delay": _NOT_NEGATIVE,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "seed": _SEED,
    "data_seed": _SEED,
}
"""The values that make sense, where the type alone allows more."""


def governed(name: str) -> str | None:
    """Why a recipe cannot set this field under ``training``, or None where it can."""
    return _UPLOAD if name.startswith("hub_") else GOVERNED.get(name)


def allowed_fields() -> dict[str, TrainingField]:
    """The fields that ``training:`` takes."""
    return {name: field for name, field in training_fields().items() if not governed(name)}


def field_type(name: str) -> Any:
    """The type of a training field with its range, as pydantic takes it."""
    base = TYPES.get(name, training_fields()[name].type)
    return Annotated[base, RANGES[name]] if name in RANGES else base


def check_training(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` unchanged; raises ValidationError with all mistakes in them."""
    errors: list[InitErrorDetails] = []
    for name, value in values.items():
        errors += _mistakes(name, value)
    if errors:
        raise ValidationError.from_exception_data("training", errors)
    return values


def _mistakes(name: str, value: Any) -> Iterator[InitErrorDetails]:
    pointer = governed(name)
    if pointer:
        yield _error(
            name,
            value,
            PydanticCustomError("governed", "cannot be set here: {to}", {"to": pointer}),
        )
    elif name not in training_fields():
        yield InitErrorDetails(type="extra_forbidden", loc=(name,), input=value)
    else:
        try:
            _adapter(name).validate_python(value, strict=True)
        except ValidationError as error:
            yield _value_error(name, value, error)


def _error(name: str, value: Any, error: PydanticCustomError) -> InitErrorDetails:
    return InitErrorDetails(type=error, loc=(name,), input=value)


def _value_error(name: str, value: Any, error: ValidationError) -> InitErrorDetails:
    errors = error.errors(include_url=False)
    first, type_ = errors[0], field_type(name)
    if isinstance(value, list):  # show the item that is wrong
        value = max(errors, key=lambda item: len(item["loc"]))["input"]
    if first["type"] in (
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "finite_number",
    ):
        return InitErrorDetails(type=first["type"], loc=(name,), input=value, ctx=first.get("ctx", {}))
    context: dict[str, Any] = {"expected": describe(type_), "names": list(choices(type_))}
    return _error(name, value, PydanticCustomError("wrong_value", "expected {expected}", context))


@lru_cache(maxsize=256)
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(field_type(name), config=ConfigDict(strict=True, allow_inf_nan=False))


def choices(type_: Any) -> tuple[str, ...]:
    """The strings that a type allows, where it allows only some."""
    if typing.get_origin(type_) is Literal:
        return tuple(value for value in typing.get_args(type_) if isinstance(value, str))
    arguments = [argument for argument in typing.get_args(type_) if argument is not type_]
    return tuple(dict.fromkeys(name for argument in arguments for name in choices(argument)))


_WORDS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
    Any: "anything",
}


def describe(type_: Any) -> str:
    """A type in words: ``an integer or null``."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return join_names(
            f"{value}".lower() if isinstance(value, bool) else f"{value}" for value in arguments
        )
    if origin is list:
        inner = describe(arguments[0])
        return "a list of strings" if inner == "a string" else f"a list of {inner}"
    if origin is dict:
        return "a mapping"
    if arguments:
        return join_types(describe(argument) for argument in arguments)
    return _WORDS.get(type_, "a value")
