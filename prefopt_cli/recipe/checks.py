"""Combinations of settings that cannot work, found in the plain data before anything is loaded.

They look at the data rather than at the finished ``Recipe`` so that they are told together with wrong
types and unknown keys. A value that is itself mistaken counts as not given.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.launch_checks import LAUNCH_CHECKS
from prefopt_cli.recipe.method_checks import METHOD_CHECKS, known_levels
from prefopt_cli.recipe.problems import Path, Problem, shown
from prefopt_cli.recipe.schemes import find_scheme
from prefopt_cli.recipe.values import Check, Settings

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
    "sequential": ("sequential/gradient_weight",),
    "self_supervised": ("ssl/loss", "ssl/accuracy"),
}
"""What those of a method report besides; self_supervised also the accuracy at each of its levels."""


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
    method, align = settings.get("method", "name"), settings.get(*settings.alignment(), "name")
    if method == "self_supervised" and settings.get("method", "ssl_coef") == 0:
        method = align  # there is no degree loss
    unsure = method not in METHOD_METRICS or align not in METHOD_METRICS
    for name, metrics in METHOD_METRICS.items():
        yield from metrics if unsure or name in (method, align) else ()
    if unsure or method == "self_supervised":
        yield from (f"ssl/accuracy_level_{level}" for level in range(known_levels(settings)))


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


def _optimizer_of_the_head(settings: Settings) -> Iterator[Problem]:
    """Some step through the model's own weights, one by one; the classifier head is none of them."""
    optimizer = str(settings.training("optim"))
    learns_degrees = (
        settings.get("method", "name") == "self_supervised" and settings.get("method", "ssl_coef") != 0
    )
    if learns_degrees and (optimizer.endswith("_layerwise") or optimizer in ("lomo", "adalomo")):
        yield _problem(
            "optim",
            f"{optimizer} steps during the backward pass and never trains the classifier of method "
            "self_supervised; use another, for example adamw_torch, or method.ssl_coef: 0",
        )


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
    _optimizer_of_the_head,
    *METHOD_CHECKS,
    *LAUNCH_CHECKS,
    _model_of_a_scheme,
    _data_of_a_scheme,
)


def check_combinations(data: Any, mistaken: Iterable[Path]) -> list[Problem]:
    """The combinations in ``data`` that cannot work; ``mistaken`` are paths already told as mistakes."""
    settings = Settings(data, mistaken)
    return [problem for check in CHECKS for problem in check(settings)]
