"""The recipe as frozen, validated objects.

Field names are those of ``TrainingArguments``/``DPOConfig``, ``LoraConfig`` and
``datasets.load_dataset``. Nothing here imports torch, transformers or trl: a recipe is judged in
milliseconds. Descriptions become the documentation that editors show.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator

from prefopt_cli.recipe.data_settings import DatasetSettings, Source
from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.recipe.methods import (
    ALIGNMENTS,
    DIMENSION,
    GPO_LOSSES,
    METHODS,
    TAKE_LISTS,
    Alignment,
    AnyMethod,
    GPOSettings,
    Method,
    PairSettings,
    Regularizer,
    SelfSupervisedSettings,
    SequentialSettings,
    SoftSettings,
    Weighting,
    place_of_alignment,
)
from prefopt_cli.recipe.quantization_settings import Quantization, QuantizationSettings
from prefopt_cli.recipe.section import Scalar, Section
from prefopt_cli.recipe.training_settings import check_training

__all__ = [
    "ALIGNMENTS",
    "DIMENSION",
    "GPO_LOSSES",
    "METHODS",
    "TAKE_LISTS",
    "Alignment",
    "DatasetSettings",
    "GPOSettings",
    "LaunchSettings",
    "LoraAdapter",
    "Method",
    "ModelSettings",
    "PairSettings",
    "QuantizationSettings",
    "Recipe",
    "Regularizer",
    "Scalar",
    "Section",
    "SelfSupervisedSettings",
    "SequentialSettings",
    "SoftSettings",
    "Source",
    "Weighting",
    "dimension_of",
    "place_of_alignment",
]


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


class Recipe(Section):
    """One training run."""

    model: ModelSettings
    adapter: Adapter = Field(default="none", description="none trains all weights, {type: lora} an adapter.")
    quantization: Quantization = Field(
        default="none", description="none: the weights as they are; {bits: 4} or {bits: 8} under an adapter."
    )
    dataset: DatasetSettings
    method: AnyMethod = Field(description="What to optimise; `name` picks the method.")
    training: Annotated[dict[str, Any], AfterValidator(check_training)] = Field(
        default_factory=dict, description="Any field of TrainingArguments or DPOConfig, by its own name."
    )
    launch: LaunchSettings = LaunchSettings()
    dimension: str | None = Field(
        default=None,
        description="What the preferences are about, as later stages call it; null: the name of output_dir's folder.",
        json_schema_extra={"pattern": f"^{DIMENSION.pattern}$"},
    )
    output_dir: str = Field(min_length=1, description="The run folder. Never overwritten unasked.")

    @field_validator("dimension")
    @classmethod
    def _dimension_name(cls, value: str | None) -> str | None:
        if value is not None and not DIMENSION.fullmatch(value):
            raise ValueError(
                "a dimension's name must consist of letters, digits, '_', '-' and '.', and begin with a letter or digit"
            )
        return value


def dimension_of(recipe: Recipe) -> str:
    """What a recipe's preferences are about: as it says, or the name of its run's folder."""
    return recipe.dimension or Path(recipe.output_dir).expanduser().absolute().name
