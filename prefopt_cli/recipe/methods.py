"""The ``method`` section: one class of settings for each method."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, WrapValidator, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefopt_cli.recipe.data_settings import Sources
from prefopt_cli.recipe.section import Section

GPO_LOSSES = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")
"""The losses of the GPO paper's table, in its order (methods: ``prefopt_cli.losses.gpo``)."""

CUSTOM_LOSS = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
"""``package.module:function``, a user's own f."""


class AlignmentSettings(Section):
    """A method that is an alignment loss: it trains alone, or beside the loss of another method."""

    name: str

    @property
    def alignment(self) -> Self:
        """The settings of the alignment loss: these."""
        return self


class PairSettings(AlignmentSettings):
    """What a convex f of one log-ratio margin per pair takes."""

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


class GPOSettings(PairSettings):
    """Generalized Preference Optimization (Tang et al., ICML 2024, arXiv 2402.05749)."""

    name: Literal["gpo"]


DIMENSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""A dimension's name: it names metrics, files and folders."""

Weight = Annotated[float, Field(ge=0.0)]


class SequentialSettings(PairSettings):
    """Sequential Preference Optimization (Lou et al., AAAI 2025, arXiv 2405.12739): a stage after earlier ones."""

    name: Literal["sequential"]
    previous: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        description="Run folders of the earlier stages in order; the run starts from the policy of the last one."
    )
    lambdas: Weight | dict[str, Weight] = Field(
        description="lambda of every earlier dimension, {helpful: 0.5}, or one number for all. Higher keeps it more; "
        "0 for all is naive sequential training."
    )
    adapter_per_stage: Literal["continue", "new"] = Field(
        default="continue",
        description="With an adapter: train the earlier stage's on, or a new one on top of it.",
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


class SoftSettings(AlignmentSettings):
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


Alignment = GPOSettings | SoftSettings | SequentialSettings
"""Any alignment loss's settings: a union, told apart by `name`."""

ALIGNMENTS: dict[str, type[Alignment]] = {
    "gpo": GPOSettings,
    "soft": SoftSettings,
    "sequential": SequentialSettings,
}
"""The alignment losses by their `name:`."""

TAKE_LISTS = ("soft",)
"""Alignment losses that take whole lists of responses; the others take pairs."""


def _picker(known: Mapping[str, type[Section]]) -> Callable[[Any, Any], Any]:
    """A validator by the settings of the named method alone: no mistakes of the methods not meant."""

    def pick(value: Any, union: Any) -> Any:
        if isinstance(value, tuple(known.values())):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("dict_type", "expected a mapping")
        names = {"expected": ", ".join(known), "names": list(known)}
        if "name" not in value:
            raise _name_error(value, PydanticCustomError("missing", "missing; one of {expected}", names))
        name = value["name"]
        if name == "self_supervised" and name not in known:
            raise _name_error(name, PydanticCustomError("nested_method", _NESTED, names))
        if not isinstance(name, str) or name not in known:
            raise _name_error(
                name, PydanticCustomError("unknown_method", "expected one of {expected}", names)
            )
        return known[name].model_validate(value)

    return pick


_NESTED = "self_supervised adds to an alignment loss and cannot be one itself; use one of {expected}"


def _name_error(value: Any, error: PydanticCustomError) -> ValidationError:
    return ValidationError.from_exception_data(
        "method", [InitErrorDetails(type=error, loc=("name",), input=value)]
    )


MOST_LEVELS = 32
"""More degrees than a response has key phrases cannot be told apart; few have so many."""


class SelfSupervisedSettings(Section):
    """Self-supervised Preference Optimization (Li et al., EMNLP 2024 Findings, arXiv 2409.17791)."""

    name: Literal["self_supervised"]
    align: Annotated[Alignment, WrapValidator(_picker(ALIGNMENTS), json_schema_input_type=Alignment)] = Field(
        description="The alignment loss beside it, written as under `method`: {name: gpo, beta: 0.1}."
    )
    ssl_coef: float = Field(
        default=0.1,
        ge=0.0,
        description="Weight of the preference-degree loss; 0 trains the alignment loss alone.",
    )
    levels: int = Field(
        default=4,
        ge=2,
        le=MOST_LEVELS,
        description="Degrees of a response: level k lacks the top round(n k / levels) of its n key phrases.",
    )
    levels_per_step: int = Field(
        default=1,
        ge=1,
        description="Levels drawn per response and step; more is more signal and more tokens.",
    )
    apply_to: Literal["both", "chosen", "rejected"] = Field(
        default="both", description="Responses whose degrees are to be told."
    )
    pooling: Literal["last", "mean"] = Field(
        default="last",
        description="What the classifier reads: the hidden state of the last response token, or the mean of all.",
    )
    stopwords: str | list[str] = Field(
        default="en",
        description="Words between key phrases: a language (en, de, ...), a file with one word per line, or a list.",
        json_schema_extra={"minLength": 1, "minItems": 1},
    )
    head_learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        description="Learning rate of the classifier head; it follows the schedule of training.learning_rate. null: "
        "1 / hidden size, so that a step moves the logits alike at any width.",
    )

    @field_validator("stopwords")
    @classmethod
    def _some_stopwords(cls, value: str | list[str]) -> str | list[str]:
        if not "".join(value).strip():
            raise ValueError(
                "an empty stop list makes one key phrase of all words up to the next punctuation mark; "
                "name a language such as en, a file, or the words"
            )
        return value

    @property
    def alignment(self) -> Alignment:
        """The settings of the alignment loss."""
        return self.align

    @property
    def learns_degrees(self) -> bool:
        """Whether there is a degree loss at all."""
        return self.ssl_coef > 0


Method = Alignment | SelfSupervisedSettings
"""Any method's settings: a union, told apart by `name`."""


def place_of_alignment(method: Method) -> str:
    """Where a recipe has the settings of the alignment loss, for messages."""
    return "method" if method is method.alignment else "method.align"


METHODS: dict[str, type[Method]] = {**ALIGNMENTS, "self_supervised": SelfSupervisedSettings}
"""Every method by its `name:`."""

AnyMethod = Annotated[Method, WrapValidator(_picker(METHODS), json_schema_input_type=Method)]
"""The field of a recipe."""
