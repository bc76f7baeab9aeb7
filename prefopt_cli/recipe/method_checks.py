"""Combinations in the ``method`` section that cannot work; those of all sections: ``prefopt_cli.recipe.checks``."""

from collections.abc import Iterator

from prefopt_cli.recipe.methods import ALIGNMENTS, MOST_LEVELS, TAKE_LISTS, SelfSupervisedSettings
from prefopt_cli.recipe.problems import Problem, dotted, join_names
from prefopt_cli.recipe.stopwords import stopwords_file, stopwords_problem
from prefopt_cli.recipe.values import Check, Settings


def _lists_for_the_method(settings: Settings) -> Iterator[Problem]:
    place, lists = settings.alignment(), settings.get("dataset", "lists")
    name, where = settings.get(*place, "name"), dotted(place)
    if lists == "whole" and name in ALIGNMENTS and name not in TAKE_LISTS:
        yield Problem(
            ("dataset", "lists"),
            f"{where} {name} compares pairs; use all_pairs or adjacent_pairs, or {where} {join_names(TAKE_LISTS)}",
        )


def _weights_need_pairs_to_compare(settings: Settings) -> Iterator[Problem]:
    mu = (*settings.alignment(), "mu")
    weighted = settings.get(*mu) not in (None, "none")
    if weighted and settings.training("per_device_train_batch_size") == 1:
        yield Problem(
            mu,
            "weighs the pairs that go through the model together, and per_device_train_batch_size is 1; use at least "
            "2, or mu: none",
        )


def _soft_without_reference_scores(settings: Settings) -> Iterator[Problem]:
    place = settings.alignment()
    if settings.get(*place, "name") != "soft":
        return
    for name in ("precompute_ref_log_probs", "precompute_ref_batch_size"):
        if settings.get("training", name) is not None:
            yield Problem(
                ("training", name),
                f"{dotted(place)} soft never scores the data with the reference policy; leave it out",
            )


def _earlier_policies_are_scored_before(settings: Settings) -> Iterator[Problem]:
    place = settings.alignment()
    sequential = settings.get(*place, "name") == "sequential"
    if sequential and settings.get("training", "precompute_ref_log_probs") is False:
        yield Problem(
            ("training", "precompute_ref_log_probs"),
            f"{dotted(place)} sequential scores the data with all earlier policies before it trains; leave it out",
        )


def _new_adapter_needs_one(settings: Settings) -> Iterator[Problem]:
    key = (*settings.alignment(), "adapter_per_stage")
    full = settings.get("adapter") in (None, "none") and not settings.mistaken("adapter")
    if settings.get(*key) == "new" and full:
        yield Problem(
            key, "there is no adapter in this recipe; set adapter: {type: lora, ...}, or leave it out"
        )


def known_levels(settings: Settings) -> int:
    """Levels of self_supervised; a mistaken number stands for as many as there may be."""
    levels = ("method", "levels")
    if settings.mistaken(*levels):
        return MOST_LEVELS
    return settings.get(*levels) or int(SelfSupervisedSettings.model_fields["levels"].default)


def _enough_levels(settings: Settings) -> Iterator[Problem]:
    if settings.get("method", "name") != "self_supervised":
        return
    drawn, levels = settings.get("method", "levels_per_step"), known_levels(settings)
    if drawn is not None and drawn > levels:
        yield Problem(
            ("method", "levels_per_step"),
            f"cannot draw {drawn} of {levels} levels; use at most {levels}, or raise method.levels",
        )


def _known_language(settings: Settings) -> Iterator[Problem]:
    """A file is looked for when a run begins: the recipe of an earlier run is sound without it."""
    stopwords = settings.get("method", "stopwords")
    if settings.get("method", "name") != "self_supervised" or not isinstance(stopwords, str):
        return
    told = None if stopwords_file(stopwords) else stopwords_problem(stopwords)
    if told:
        yield Problem(("method", "stopwords"), told)


METHOD_CHECKS: tuple[Check, ...] = (
    _lists_for_the_method,
    _weights_need_pairs_to_compare,
    _soft_without_reference_scores,
    _earlier_policies_are_scored_before,
    _new_adapter_needs_one,
    _enough_levels,
    _known_language,
)
