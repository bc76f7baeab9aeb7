"""Combinations of settings that cannot work, found in the plain data before anything is loaded.

They look at the data rather than at the finished ``Recipe`` so that they are told together with wrong
types and unknown keys. A value that is itself mistaken counts as not given.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.methods import METHODS, TAKE_LISTS
from prefopt_cli.recipe.problems import Path, Problem, join_names, shown
from prefopt_cli.recipe.schemes import find_scheme
from prefopt_cli.recipe.training_fields import MISSING, training_fields


class Settings:
    """Values of a recipe by key path: as written if sound, else the default."""

    def __init__(self, data: Any, mistaken: Iterable[Path]) -> None:
        self._data = data
        self._mistaken = set(mistaken)

    def get(self, *path: str | int) -> Any:
        """The value at ``path``, or None."""
        value = self._data
        for depth, key in enumerate(path, start=1):
            listed = isinstance(value, list) and isinstance(key, int) and key < len(value)
            if not (listed or (isinstance(value, dict) and key in value)) or path[:depth] in self._mistaken:
                return None
            value = value[key]
        return value

    def training(self, name: str) -> Any:
        """A training field, with its default where it is not given."""
        value = self.get("training", name)
        if value is None and name == "eval_strategy":
            return "epoch" if self.has_eval_sets() else "no"  # prefopt's own default
        if value is None and name in training_fields() and training_fields()[name].default is not MISSING:
            return training_fields()[name].default
        return value

    def eval_sets(self) -> list[str]:
        """Names of the eval sets, the held-out share among them."""
        named = self.get("dataset", "eval")
        holdout = ["holdout"] if self.get("dataset", "holdout") is not None else []
        return [*(named if isinstance(named, dict) else ()), *holdout]

    def sources(self) -> Iterator[Path]:
        """Where the sources stand, each a mapping or its name alone."""
        named = self.get("dataset", "eval")
        sets: list[Path] = [("dataset", "train")]
        sets += [("dataset", "eval", name) for name in (named if isinstance(named, dict) else ())]
        prompts: Path = ("method", "regularizer", "prompts")
        sets += [prompts] if self.get(*prompts) is not None else []
        for path in sets:
            value = self.get(*path)
            yield from [(*path, entry) for entry in range(len(value))] if isinstance(value, list) else [path]

    def has_eval_sets(self) -> bool:
        """Whether there is anything to evaluate on; a mistaken section gets the benefit of the doubt."""
        unsure = any(path[:1] in ((), ("dataset",)) for path in self._mistaken)
        return bool(unsure or self.eval_sets())


EVAL_METRICS = (
    "loss",
    "entropy",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
)
"""What every evaluation reports, each after the name of its set: `heldout_loss`."""

METHOD_METRICS = {
    "gpo": ("gpo/gradient_weight", "gpo/squared_log_ratio"),
    "soft": ("soft/gradient_weight",),
}
"""What those of a method report besides."""

Check = Callable[[Settings], Iterator[Problem]]


def _problem(name: str, message: str) -> Problem:
    return Problem(("training", name), message)


def _evaluation_needs_data(settings: Settings) -> Iterator[Problem]:
    evaluates = settings.training("eval_strategy") != "no"
    best = settings.training("load_best_model_at_end")
    if not settings.has_eval_sets():
        fix = "nothing to evaluate on; add dataset.eval or dataset.holdout"
        if evaluates:
            yield _problem("eval_strategy", fix)
        if best:
            yield _problem("load_best_model_at_end", fix)
        if settings.training("eval_on_start"):
            yield _problem("eval_on_start", fix)
    scheduler = settings.training("lr_scheduler_type")
    if not evaluates and scheduler in ("reduce_lr_on_plateau", "greedy"):
        yield _problem("lr_scheduler_type", f"{scheduler} follows the evaluation; set training.eval_strategy")


def _best_model(settings: Settings) -> Iterator[Problem]:
    if not settings.training("load_best_model_at_end"):
        return
    evaluate, save = settings.training("eval_strategy"), settings.training("save_strategy")
    if evaluate == "no":
        yield _problem("load_best_model_at_end", "needs training.eval_strategy: steps or epoch")
    elif save not in (evaluate, "best"):
        yield _problem(
            "load_best_model_at_end",
            f"needs save_strategy ({save}) to be the same as eval_strategy ({evaluate}), or best",
        )
    elif evaluate == save == "steps":
        yield from _whole_multiple(settings)


def _metric_of_one_set(settings: Settings) -> Iterator[Problem]:
    """Every metric carries its set's name, so the library's default, plain `loss`, never exists."""
    wanted_by = [
        settings.training("load_best_model_at_end") and "load_best_model_at_end",
        settings.training("save_strategy") == "best" and "save_strategy",
        settings.training("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and "lr_scheduler_type",
    ]
    name, sets = next(filter(None, wanted_by), None), settings.eval_sets()
    if not name or not sets:
        return
    metric = settings.training("metric_for_best_model")
    if metric is None:
        yield _problem(name, f"needs training.metric_for_best_model, for example {sets[0]}_loss")
    elif str(metric).removeprefix("eval_") not in [
        f"{each}_{known}" for each in sets for known in (*EVAL_METRICS, *_method_metrics(settings))
    ]:
        yield _problem(
            "metric_for_best_model",
            f"expected a metric of one eval set, for example {sets[0]}_loss or {sets[0]}_rewards/accuracies, "
            f"found {shown(metric)}",
        )


def _method_metrics(settings: Settings) -> Iterator[str]:
    method = settings.get("method", "name")
    for name, metrics in METHOD_METRICS.items():
        yield from metrics if name == method or method not in METHOD_METRICS else ()


def _whole_multiple(settings: Settings) -> Iterator[Problem]:
    every = settings.training("eval_steps") or settings.training("logging_steps")
    save = settings.training("save_steps")
    if (every < 1) != (save < 1) or abs(save / every - round(save / every)) > 1e-9:
        yield _problem(
            "load_best_model_at_end",
            f"needs save_steps ({save}) to be a whole multiple of eval_steps ({every})",
        )


def _one_precision(settings: Settings) -> Iterator[Problem]:
    for half, brain in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if settings.training(half) and settings.training(brain):
            yield _problem(half, f"at most one of {half} and {brain} can be true")
    half_weights = settings.get("model", "dtype") == "float16"
    full = settings.get("adapter") in (None, "none")
    if settings.training("fp16") and half_weights and full:
        yield Problem(
            ("model", "dtype"),
            "fp16 training cannot scale the gradients of float16 weights; use dtype: auto or training.bf16",
        )


def _holdout_name(settings: Settings) -> Iterator[Problem]:
    sets = settings.get("dataset", "eval")
    if settings.get("dataset", "holdout") is not None and isinstance(sets, dict) and "holdout" in sets:
        yield Problem(
            ("dataset", "eval", "holdout"),
            "dataset.holdout makes a set of this name; rename one or drop the other",
        )


def _step_counts(settings: Settings) -> Iterator[Problem]:
    steps = settings.training("max_steps")
    if steps == 0 or steps < -1:
        yield _problem("max_steps", f"expected at least 1, or -1 to train num_train_epochs, found {steps}")
    for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = settings.training(name)
        if value is not None and value > 1 and value != int(value):
            yield _problem(
                name, f"expected a whole number of steps, or a share of all below 1, found {value}"
            )


def _prefetch_needs_workers(settings: Settings) -> Iterator[Problem]:
    if settings.training("dataloader_prefetch_factor") is not None and not settings.training(
        "dataloader_num_workers"
    ):
        yield _problem("dataloader_prefetch_factor", "needs training.dataloader_num_workers of at least 1")


def _lists_for_the_method(settings: Settings) -> Iterator[Problem]:
    method, lists = settings.get("method", "name"), settings.get("dataset", "lists")
    takes_lists = method in TAKE_LISTS
    if lists == "whole" and method in METHODS and not takes_lists:
        yield Problem(
            ("dataset", "lists"),
            f"method {method} compares pairs; use all_pairs or adjacent_pairs, or method {join_names(TAKE_LISTS)}",
        )


def _weights_need_pairs_to_compare(settings: Settings) -> Iterator[Problem]:
    weighted = settings.get("method", "mu") not in (None, "none")
    if weighted and settings.training("per_device_train_batch_size") == 1:
        yield Problem(
            ("method", "mu"),
            "weighs the pairs that go through the model together, and per_device_train_batch_size is 1; use at least "
            "2, or mu: none",
        )


def _soft_without_reference_scores(settings: Settings) -> Iterator[Problem]:
    if settings.get("method", "name") != "soft":
        return
    for name in ("precompute_ref_log_probs", "precompute_ref_batch_size"):
        if settings.get("training", name) is not None:
            yield _problem(name, "method soft never scores the data with the reference policy; leave it out")


def _model_of_a_scheme(settings: Settings) -> Iterator[Problem]:
    yield from _judged(settings, ("model", "name_or_path"), ("model",), "model")


def _data_of_a_scheme(settings: Settings) -> Iterator[Problem]:
    for source in settings.sources():
        alone = isinstance(settings.get(*source), str)
        yield from _judged(settings, source if alone else (*source, "source"), source, "source")


def _judged(settings: Settings, path: Path, section: Path, kind: str) -> Iterator[Problem]:
    """What the scheme of the name at ``path``, if it has one, says about it and about the keys beside it."""
    name, config, revision = settings.get(*path), (*section, "config"), (*section, "revision")
    if not isinstance(name, str):
        return
    try:
        named = find_scheme(name, kind)
        if named is None:
            return
        if kind == "model":
            named.scheme.check_model(named.name)
        else:
            named.scheme.check_dataset(named.name, None)
            path = config  # the name is sound, so whatever is wrong now is the configuration
            named.scheme.check_dataset(named.name, settings.get(*config))
    except UserError as error:
        yield Problem(path, str(error))
    if settings.get(*revision) is not None:
        yield Problem(revision, f"{name} is not on the hub and has no revisions; leave it out")


CHECKS: tuple[Check, ...] = (
    _evaluation_needs_data,
    _best_model,
    _metric_of_one_set,
    _one_precision,
    _holdout_name,
    _step_counts,
    _prefetch_needs_workers,
    _lists_for_the_method,
    _weights_need_pairs_to_compare,
    _soft_without_reference_scores,
    _model_of_a_scheme,
    _data_of_a_scheme,
)


def check_combinations(data: Any, mistaken: Iterable[Path]) -> list[Problem]:
    """The combinations in ``data`` that cannot work; ``mistaken`` are paths already told as mistakes."""
    settings = Settings(data, mistaken)
    return [problem for check in CHECKS for problem in check(settings)]
