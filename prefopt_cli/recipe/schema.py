"""The recipe as frozen, validated objects.

Field names are those of ``TrainingArguments``/``DPOConfig``, ``LoraConfig`` and
``datasets.load_dataset``. Nothing here imports torch, transformers or trl: a recipe is judged in
milliseconds. Descriptions become the documentation that editors show.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WrapValidator,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefopt_cli.recipe.training_settings import check_training

GPO_LOSSES = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")
"""The losses of the GPO paper's table, in its order (methods: ``prefopt_cli.losses.gpo``)."""

CUSTOM_LOSS = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
"""``package.module:function``, a user's own f."""

Scalar = str | int | float | bool | None


class Section(BaseModel):
    """One mapping of a recipe: immutable, and closed to keys it does not know.

    Strict: an integer is not given as text or as 8.0; a number may be given as an integer.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


class ModelSettings(Section):
    """The policy to start from. The reference policy is exactly this policy."""

    name_or_path: str = Field(
        min_length=1,
        description="Hub id, local folder, run folder of an earlier `prefopt train`, or sandbox:base.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of the loaded weights. auto: float32 where the weights are trained (mixed "
        "precision comes from training.bf16), the checkpoint's own type where an adapter is trained.",
    )
    attn_implementation: str | None = Field(
        default=None, description="As in from_pretrained: sdpa, eager, flash_attention_2, ..."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that the model's repository brings along."
    )
    chat_template: str | None = Field(
        default=None, description="Path of a Jinja file that replaces the tokenizer's chat template."
    )


class LoraAdapter(Section):
    """Low-rank adapters (peft's ``LoraConfig``): a few percent of the weights are trained."""

    type: Literal["lora"]
    r: int = Field(default=16, gt=0, description="Rank. Higher learns more and uses more memory.")
    lora_alpha: int = Field(default=32, gt=0, description="Scale of the update: lora_alpha / r.")
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="all-linear, a list of module names, or a regular expression."
    )
    exclude_modules: str | list[str] | None = Field(
        default=None, description="Modules left alone, as target_modules."
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules trained in full and saved beside it."
    )
    bias: Literal["none"] = Field(
        default="none", description="Biases stay frozen, as the reference needs them."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r).")
    use_dora: bool = Field(default=False, description="Weight-decomposed adapters (DoRA).")
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = Field(
        default=True, description="As in LoraConfig, as far as the policy starts as the reference."
    )
    layers_to_transform: list[int] | int | None = Field(default=None, description="Only these layers.")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="Ranks by module name.")
    alpha_pattern: dict[str, int] = Field(default_factory=dict, description="lora_alpha by module name.")


def _adapter_kind(value: Any) -> str:
    """Which member of the union to judge a value by; the brackets keep it apart from keys of a recipe."""
    return "<lora>" if isinstance(value, Mapping | LoraAdapter) else "<none>"


Adapter = Annotated[
    Annotated[LoraAdapter, Tag("<lora>")] | Annotated[Literal["none"], Tag("<none>")],
    Discriminator(_adapter_kind),
]


def _as_list(value: Any) -> Any:
    """A lone source may be written without the list around it."""
    return [value] if isinstance(value, Mapping | str | Source) else value


def _as_source(value: Any) -> Any:
    """A source may be its name alone."""
    return {"source": value} if isinstance(value, str) else value


DATA_FORMATS = (
    "standard",
    "conversational",
    "implicit_standard",
    "implicit_conversational",
    "hh_transcript",
)


class Source(Section):
    """Rows from one place: a file, a folder on disk, a dataset of the hub, or the sandbox."""

    source: str = Field(
        min_length=1,
        description="Path of .json, .jsonl, .csv, .parquet (.gz too), of a datasets folder, a hub id, or a "
        "sandbox name: sandbox:helpful.",
    )
    config: str | None = Field(
        default=None, description="Configuration (subset) of a hub dataset; kind of a sandbox's rows."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub dataset.")
    split: str = Field(
        default="train", min_length=1, description="Split; slices as in datasets: train[:10%]."
    )
    format: Literal[
        "auto", "standard", "conversational", "implicit_standard", "implicit_conversational", "hh_transcript"
    ] = Field(default="auto", description="Shape of the rows; auto detects it and the receipt names it.")
    columns: dict[Literal["prompt", "chosen", "rejected", "id"], str] = Field(
        default_factory=dict, description="Column names where they differ: {prompt: question}."
    )
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="Keep rows whose columns have these values (a list: any of them)."
    )
    limit: int | None = Field(
        default=None, gt=0, description="At most so many rows, after where and shuffling."
    )
    weight: float = Field(
        default=1.0,
        gt=0.0,
        description="How often each row occurs in an epoch: 0.5 keeps half, 2 repeats.",
    )


OneSource = Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=Source | str)]
Sources = Annotated[
    list[OneSource],
    BeforeValidator(_as_list, json_schema_input_type=list[OneSource] | OneSource),
    Field(min_length=1),
]


class DatasetSettings(Section):
    """Preferences to train on and to evaluate on."""

    train: Sources = Field(description="One source or several, mixed by weight.")
    eval: dict[str, Sources] = Field(default_factory=dict, description="Named held-out sets.")
    holdout: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Share of the training prompts set aside, with all their rows, as eval set `holdout`.",
    )
    max_length: int | None = Field(
        default=1024, gt=1, description="Longest prompt + response, in tokens; null: no limit."
    )
    on_overflow: Literal["drop", "truncate_response", "error"] = Field(
        default="drop", description="What happens to a longer row. Always counted in the receipt."
    )
    shuffle: bool = Field(
        default=True, description="Shuffle each training source (before limit) and the mixture."
    )
    seed: int = Field(default=0, ge=0, description="Seed of shuffling, weights and holdout.")

    @field_validator("eval")
    @classmethod
    def _eval_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):  # it names files of the run folder
                raise ValueError(f"the set name {name!r} must consist of letters, digits, '_', '-' and '.'")
        return value


class GPOSettings(Section):
    """Generalized Preference Optimization (Tang et al., ICML 2024, arXiv 2402.05749)."""

    name: Literal["gpo"]
    loss: str = Field(
        default="logistic",
        description="f: " + ", ".join(GPO_LOSSES) + ", or your own as package.module:function.",
        json_schema_extra={"anyOf": [{"enum": list(GPO_LOSSES)}, {"pattern": CUSTOM_LOSS.pattern}]},
    )
    beta: float = Field(default=0.1, gt=0.0, description="Strength of the pull towards the reference policy.")
    length_normalize: bool = Field(
        default=False,
        description="Divide each log-ratio by its number of response tokens (IPO as in TRL).",
    )

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        module = value.partition(":")[0]
        if value in GPO_LOSSES or (CUSTOM_LOSS.fullmatch(value) and not module.endswith(".py")):
            return value
        raise PydanticCustomError(
            "unknown_loss",
            "expected one of {expected}, or your own as package.module:function",
            {"expected": ", ".join(GPO_LOSSES), "names": list(GPO_LOSSES)},
        )


Method = GPOSettings
"""Any method's settings: a union, told apart by `name`."""

METHODS: dict[str, type[GPOSettings]] = {"gpo": GPOSettings}
"""Every method by its `name:`."""


def _pick_method(value: Any, union: Any) -> Section:
    """Validate by the settings of the named method alone: no mistakes of the methods not meant."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError("dict_type", "expected a mapping")
    if "name" not in value:
        raise _name_error(
            value, PydanticCustomError("missing", "missing; one of {expected}", _method_names())
        )
    if value["name"] not in METHODS:
        raise _name_error(
            value["name"],
            PydanticCustomError("unknown_method", "expected one of {expected}", _method_names()),
        )
    return METHODS[value["name"]].model_validate(value)


def _method_names() -> dict[str, Any]:
    return {"expected": ", ".join(METHODS), "names": list(METHODS)}


def _name_error(value: Any, error: PydanticCustomError) -> ValidationError:
    return ValidationError.from_exception_data(
        "method", [InitErrorDetails(type=error, loc=("name",), input=value)]
    )


class LaunchSettings(Section):
    """How the run is started."""

    processes: Literal[1] = Field(
        default=1, description="Number of processes; more come from torchrun or accelerate."
    )


class Recipe(Section):
    """One training run."""

    model: ModelSettings
    adapter: Adapter = Field(default="none", description="none trains all weights, {type: lora} an adapter.")
    quantization: Literal["none"] = Field(default="none", description="none: the weights as they are.")
    dataset: DatasetSettings
    method: Annotated[Method, WrapValidator(_pick_method, json_schema_input_type=Method)] = Field(
        description="What to optimise; `name` picks the method."
    )
    training: Annotated[dict[str, Any], AfterValidator(check_training)] = Field(
        default_factory=dict, description="Any field of TrainingArguments or DPOConfig, by its own name."
    )
    launch: LaunchSettings = LaunchSettings()
    output_dir: str = Field(min_length=1, description="The run folder. Never overwritten unasked.")
