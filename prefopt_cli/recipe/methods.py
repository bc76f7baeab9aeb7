"""The ``method`` section: one class of settings for each method."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, WrapValidator, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefopt_cli.recipe.data_settings import Sources
from prefopt_cli.recipe.section import Section

GPO_LOSSES = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")
"""The losses of the GPO paper's table, in its order (methods: ``prefopt_cli.losses.gpo``)."""

CUSTOM_LOSS = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
"""``package.module:function``, a user's own f."""


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


class Weighting(Section):
    """mu of Soft Preference Optimization: pairs count by how likely the policy finds their responses."""

    gamma: float = Field(
        gt=0.0,
        description="Exponent: log mu = gamma (logsumexp of both log-probabilities - its mean over the batch).",
    )


def _weighting_kind(value: Any) -> str:
    return "<weighted>" if isinstance(value, Mapping | Weighting) else "<none>"


class Regularizer(Section):
    """The KL to the reference policy, over responses that the policy itself writes during training."""

    estimator: Literal["token", "sequence"] = Field(
        default="token",
        description="token: gradient of the KL at each token, low variance but biased; sequence: unbiased.",
    )
    sample_every: int = Field(
        default=8,
        gt=0,
        description="Optimizer steps between two draws of samples; in between they are reused.",
    )
    num_prompts: int = Field(
        default=16, gt=0, description="Prompts of a draw, with one sample each, in every process."
    )
    max_new_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Longest sample, in tokens; null: 256, or half of the model's context where that is less.",
    )
    prompts: Sources | None = Field(
        default=None, description="Where the prompts come from; null: the prompts of dataset.train."
    )


class SoftSettings(Section):
    """Soft Preference Optimization (Sharifnassab et al., TMLR 2026, arXiv 2405.00747)."""

    name: Literal["soft"]
    alpha: float = Field(
        default=1.0,
        gt=0.0,
        description="Softmax exponent: without KL, Bradley-Terry data of reward r lead to softmax(r / alpha). Lower "
        "is sharper, higher keeps more diversity.",
    )
    kl_coef: float = Field(
        default=0.1,
        ge=0.0,
        description="Weight of KL(policy || reference) on the policy's own samples; 0: none.",
    )
    length_normalize: bool = Field(
        default=False, description="Divide each log-probability by its number of response tokens."
    )
    mu: Annotated[
        Annotated[Weighting, Tag("<weighted>")] | Annotated[Literal["none"], Tag("<none>")],
        Discriminator(_weighting_kind),
    ] = Field(default="none", description="Weights of pairs: none, or {gamma: 0.1}.")
    mu_clamp: float = Field(default=5.0, gt=0.0, description="log mu stays within plus or minus this.")
    regularizer: Regularizer = Field(
        default=Regularizer(),
        description="The samples that the KL is taken over; none are drawn with kl_coef: 0.",
    )

    @property
    def samples(self) -> bool:
        """Whether the policy has to be sampled during training."""
        return self.kl_coef > 0


Method = GPOSettings | SoftSettings
"""Any method's settings: a union, told apart by `name`."""

METHODS: dict[str, type[GPOSettings] | type[SoftSettings]] = {"gpo": GPOSettings, "soft": SoftSettings}
"""Every method by its `name:`."""

TAKE_LISTS = ("soft",)
"""Methods that take whole lists of responses; the others take pairs."""


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


AnyMethod = Annotated[Method, WrapValidator(_pick_method, json_schema_input_type=Method)]
"""The field of a recipe."""
