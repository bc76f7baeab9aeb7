"""What a method asks of a run: a trainer, the reference policy in some form, a line for the user."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prefopt_cli.losses.gpo import ConvexFunction, Probe
from prefopt_cli.models.ancestry import Ancestry
from prefopt_cli.recipe.schema import (
    Method,
    PairSettings,
    Recipe,
    SelfSupervisedSettings,
    SequentialSettings,
    SoftSettings,
    place_of_alignment,
)
from prefopt_cli.training.functions import describe_probe, find_function, require_usable
from prefopt_cli.training.gpo import GPOTrainer
from prefopt_cli.training.preparation import training_field
from prefopt_cli.training.self_supervised import SelfSupervisedTrainer
from prefopt_cli.training.sequential import SequentialTrainer
from prefopt_cli.training.soft import SoftTrainer
from prefopt_cli.training.trainer import PreferenceTrainer

ReferenceUse = Literal["data", "samples", "none"]

_POOLINGS = {"last": "last token's state", "mean": "mean of the tokens' states"}


@dataclass(frozen=True)
class Objective:
    """A method that was found sound."""

    description: str
    """One line for the user."""
    figures: dict[str, Any]
    """What was found out about it, for the manifest; must be the same when a run goes on."""
    reference: ReferenceUse
    """What the reference policy is asked about: the data, the policy's own samples, or nothing."""
    trainer: type[PreferenceTrainer]
    arguments: dict[str, Any]
    """What the trainer takes besides the arguments of `PreferenceTrainer` and, for `samples`, of `SoftTrainer`."""


def require_sound(method: Method, folder: Path) -> None:
    """Judge what can be judged before data, models and earlier stages are looked at.

    Raises:
        UserError: f cannot be trained on; see `find_objective`.
    """
    if isinstance(method.alignment, PairSettings):
        _probed(method.alignment, place_of_alignment(method), folder)


def find_objective(method: Method, folder: Path, ancestry: Ancestry | None = None) -> Objective:
    """Find and judge what a recipe's method section names.

    Args:
        method: the settings.
        folder: where a user's own f is looked for first.
        ancestry: the stages that a sequential method comes after; see `find_ancestry`.

    Raises:
        UserError: it cannot be trained on.
        ValueError: the method is sequential, and no stages are given.
    """
    settings = method.alignment
    place = place_of_alignment(method)
    if isinstance(settings, SoftSettings):
        align = _soft(settings, place)
    else:
        align = _of_pairs(settings, place, folder, ancestry)
    return _self_supervised(method, align) if isinstance(method, SelfSupervisedSettings) else align


def precomputes(recipe: Recipe, objective: Objective) -> bool:
    """Whether the reference scores the data before training."""
    return objective.reference == "data" and training_field(recipe.training, "precompute_ref_log_probs")


def _of_pairs(settings: PairSettings, place: str, folder: Path, ancestry: Ancestry | None) -> Objective:
    if isinstance(settings, SequentialSettings) and ancestry is None:
        raise ValueError("a sequential method needs the stages that it comes after")
    function, probe = _probed(settings, place, folder)
    figures = asdict(probe)
    del figures["problems"]  # there are none, or it would not be usable
    gpo = Objective(
        describe_probe(settings.loss, probe),
        {"f": figures},
        "data",
        GPOTrainer,
        {"settings": settings, "function": function},
    )
    if ancestry is None:
        return gpo
    return replace(
        gpo,
        description=f"{gpo.description}; {ancestry.describe()}",
        figures={**gpo.figures, "previous_stages": ancestry.figures()},
        trainer=SequentialTrainer,
        arguments={**gpo.arguments, "ancestry": ancestry},
    )


def _probed(settings: PairSettings, place: str, folder: Path) -> tuple[ConvexFunction, Probe]:
    function = find_function(settings.loss, folder, f"{place}.loss")
    return function, require_usable(settings.loss, function, f"{place}.loss")


def _soft(settings: SoftSettings, place: str) -> Objective:
    regularizer = settings.regularizer
    parts = [f"soft: alpha = {settings.alpha:g}"]
    if settings.length_normalize:
        parts[0] += " on log-probabilities per token"
    elif not settings.samples:
        parts[0] += f", whose optimum is softmax(r / {settings.alpha:g})"
    if settings.mu != "none":
        parts.append(f"pairs weighted by mu (gamma {settings.mu.gamma:g}) within each micro-batch")
    if settings.samples:
        parts.append(
            f"{settings.kl_coef:g} KL to the reference on {regularizer.num_prompts} samples per process, drawn every "
            f"{regularizer.sample_every} steps ({regularizer.estimator} estimator)"
        )
    else:
        parts.append(f"kl_coef is 0, so there is no KL to the reference, and {place}.regularizer is not used")
    use: ReferenceUse = "samples" if settings.samples else "none"
    return Objective("; ".join(parts), {}, use, SoftTrainer, {"settings": settings})


def _self_supervised(settings: SelfSupervisedSettings, align: Objective) -> Objective:
    if not settings.learns_degrees:
        return replace(align, description=f"{align.description}; ssl_coef is 0, so there is no degree loss")
    sides = "chosen and rejected" if settings.apply_to == "both" else settings.apply_to
    drawn = f"{settings.levels_per_step} of {settings.levels} degrees"
    return replace(
        align,
        description=(
            f"{align.description}; beside it {settings.ssl_coef:g} times the loss of telling the degree of {sides} "
            f"responses ({drawn} per response and step, read from the {_POOLINGS[settings.pooling]})"
        ),
        trainer=SelfSupervisedTrainer.beside(align.trainer),
        arguments={**align.arguments, "degrees": settings},
    )
