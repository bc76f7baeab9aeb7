"""Mistakes of a chain's file that no single recipe can have: its stages, their names and their lambdas."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from prefopt_cli.chain.merging import Merged
from prefopt_cli.chain.settings import BASE, PLAN_FILE, RESOLVED_FILE, RETENTION_FILES
from prefopt_cli.recipe.problems import Problem, join_names, shown
from prefopt_cli.recipe.schema import (
    DIMENSION,
    LoraAdapter,
    QuantizationSettings,
    Recipe,
    SequentialSettings,
)
from prefopt_cli.recipe.schemes import has_scheme
from prefopt_cli.recipe.suggestions import nearest

SHARED_KEYS = {
    "dimension": "a stage is about a dimension; write it in the entries of stages",
    "lambdas": "every stage from the second on has its own; write them in the entries of stages",
    "previous": "set by the chain: the stages before, in their order",
    "name": "a chain has no name; the name of output_dir's folder tells it from others",
}
"""Keys that do not stand beside `stages`, and why."""

STAGE_KEYS = {
    "output_dir": "set by the chain: a stage's run lies in the chain's output_dir, under the name of its dimension",
    "previous": "set by the chain: the stages before, in their order",
    "name": "a stage is known by what it is about; write dimension",
    "stages": "a stage has no stages of its own",
}
"""Keys that do not stand in a stage, and why."""

RESERVED = {BASE, PLAN_FILE, RESOLVED_FILE, *RETENTION_FILES}


def shared_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong beside the stages."""
    for key, reason in SHARED_KEYS.items():
        if key in data:
            yield Problem((key,), reason)
    if "stages" not in data:
        close = next(
            (key for key in data if nearest(key, ["stages"]) and key not in Recipe.model_fields), None
        )
        if close:
            yield Problem((close,), "unknown key; did you mean 'stages'?")
        else:
            yield Problem(
                (),
                "stages is missing: the list of what is trained in turn, - {dimension: helpful, dataset: {train: ...}}"
                "; a recipe without it is for `prefopt train`",
            )
    elif not isinstance(data["stages"], list) or not data["stages"]:
        found = shown(data["stages"])
        yield Problem(
            ("stages",), f"expected a list of stages, - {{dimension: ..., dataset: ...}}, found {found}"
        )


def dimensions_of(stages: Sequence[Any]) -> list[str | None]:
    """The stages' dimensions; None where one is not sound."""
    found: list[str | None] = []
    for stage in stages:
        name = stage.get("dimension") if isinstance(stage, dict) else None
        sound = isinstance(name, str) and DIMENSION.fullmatch(name) and name not in RESERVED
        found.append(name if sound and name not in found else None)
    return found


def dimension_problems(stages: Sequence[Any]) -> Iterator[Problem]:
    """Stages without a dimension, or with one that cannot be used or was used before."""
    first: dict[str, int] = {}
    for index, stage in enumerate(stages):
        path = ("stages", index, "dimension")
        if not isinstance(stage, dict):
            yield Problem(path[:-1], f"expected a mapping, dimension: ..., found {shown(stage)}")
            continue
        name = stage.get("dimension")
        if name is None:
            if not any(_close_to_a_stages_own(key) == "dimension" for key in stage):
                yield Problem(path, "missing; what the stage's preferences are about, for example helpful")
        elif not isinstance(name, str) or not DIMENSION.fullmatch(name):
            yield Problem(path, f"expected a name of letters, digits, '_', '-' and '.', found {shown(name)}")
        elif name in RESERVED:
            yield Problem(
                path, f"{name} has another meaning in a chain's folder or tables; choose another name"
            )
        elif name in first:
            yield Problem(
                path, f"{name} is what stage {first[name]} is about; every stage needs a name of its own"
            )
        else:
            first[name] = index + 1


def key_problems(stage: Mapping[str, Any], index: int) -> Iterator[Problem]:
    """Keys of a stage that the chain sets itself, or that were meant for others."""
    model = stage.get("model")
    if isinstance(model, dict) and "name_or_path" in model:
        yield Problem(
            ("stages", index, "model", "name_or_path"),
            "set by the chain: a stage starts from the policy of the stage before, the first one from the chain's "
            "model.name_or_path",
        )
    for key in stage:
        if key in STAGE_KEYS:
            yield Problem(("stages", index, key), STAGE_KEYS[key])
        elif close := _close_to_a_stages_own(key):
            yield Problem(("stages", index, key), f"unknown key; did you mean {close!r}?")


def _close_to_a_stages_own(key: str) -> str | None:
    """What an unknown key of a stage was probably meant to be, of those that recipes do not have."""
    return None if key in (*Recipe.model_fields, "lambdas") else nearest(key, ["dimension", "lambdas"])


def lambda_problems(
    stage: Mapping[str, Any], index: int, dimensions: Sequence[str | None]
) -> Iterator[Problem]:
    """lambdas must speak of all earlier dimensions and of no other; values are judged with the stage's recipe."""
    path, given = ("stages", index, "lambdas"), stage.get("lambdas")
    if index == 0:
        if "lambdas" in stage:
            yield Problem(path, "the first stage has no earlier dimension to weigh; remove it")
        return
    earlier = [name for name in dimensions[:index] if name is not None]
    example = "{" + ", ".join(f"{name}: 0.5" for name in earlier) + "}"
    if given is None:
        yield Problem(
            path,
            f"missing; how much each earlier dimension counts, {example}, or one number for all; 0: not at all",
        )
    if not isinstance(given, dict) or len(earlier) < index:
        return  # one number for all, or names that cannot be judged yet
    for name in given:
        if name not in earlier:
            yield Problem((*path, name), _not_earlier(name, index, dimensions, earlier))
    missing = [name for name in earlier if name not in given]
    if missing and all(name in earlier for name in given):
        yield Problem(
            path,
            f"nothing is said about {join_names(missing, 'and')}; name every earlier dimension, as {example}",
        )


def _not_earlier(name: str, index: int, dimensions: Sequence[str | None], earlier: Sequence[str]) -> str:
    known = f"the earlier dimensions are {join_names(earlier, 'and')}"
    if len(earlier) == 1:
        known = f"the earlier dimension is {earlier[0]}"
    if name == dimensions[index]:
        return f"{name} is this stage's own dimension, and a stage cannot come after itself; {known}"
    if name in dimensions:
        later = dimensions.index(name) + 1
        return f"{name} comes later (stage {later}), and a stage only knows those before it; {known}"
    close = nearest(str(name), earlier)
    return f"no stage is about {shown(name)}; {known}" + (f"; did you mean {close!r}?" if close else "")


def data_problems(merged: Merged, dimensions: Sequence[str | None]) -> Iterator[Problem]:
    """A stage without anything to train on, and dimensions without a held-out set."""
    dataset = merged.data.get("dataset") or {}
    if not isinstance(dataset, dict):
        return
    if dataset.get("train") is None:
        yield Problem(
            ("stages", merged.index),
            "the stage has no data: write dataset: {train: ...}, here or beside stages for all",
        )
    sets = dataset.get("eval") or {}
    if not isinstance(sets, dict):
        return
    for name in dimensions:
        if name is not None and name not in sets:
            close = nearest(name, [each for each in sets if each not in dimensions])
            hint = f"; did you mean it by {close!r}?" if close else ""
            yield Problem(
                merged.place(("dataset", "eval")),
                f"no held-out set is named {name}, and the retention table needs one for every dimension{hint}",
            )


def start_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """A chain that would begin with what it makes itself."""
    model, output = data.get("model"), data.get("output_dir")
    name = model.get("name_or_path") if isinstance(model, dict) else None
    if not isinstance(name, str) or not isinstance(output, str) or not output or has_scheme(name):
        return
    start, own = (FilePath(each).expanduser().absolute().resolve() for each in (name, output))
    if start.is_relative_to(own):
        yield Problem(
            ("model", "name_or_path"),
            f"{name} is in the chain's own output_dir ({output}), so the chain would come after itself; name another "
            "model or another output_dir",
        )


def adapter_problems(before: Recipe, after: Recipe) -> Iterator[Problem]:
    """Adapters that do not go together; paths are those of the later stage's data."""
    settings, earlier, own = after.method.alignment, before.adapter, after.adapter
    yield from _quantised_in_another_way(before, after)
    if not (
        isinstance(settings, SequentialSettings)
        and isinstance(earlier, LoraAdapter)
        and isinstance(own, LoraAdapter)
    ):
        return
    if settings.adapter_per_stage == "new":
        yield from _not_stackable(earlier, own)
        return
    made = earlier.model_dump(exclude={"init_lora_weights"})
    for key, value in own.model_dump(exclude={"init_lora_weights"}).items():
        if value != made[key]:
            yield Problem(
                ("adapter", key),
                f"{shown(value)}, but the stage before has {shown(made[key])} and its adapter is trained on; use that, "
                "or method.adapter_per_stage: new",
            )


def _quantised_in_another_way(before: Recipe, after: Recipe) -> Iterator[Problem]:
    """An adapter stays on the weights that it was trained on, quantised or not, from one stage to the next."""
    if before.adapter == "none":
        return
    earlier, own = (
        each if isinstance(each, QuantizationSettings) else None
        for each in (before.quantization, after.quantization)
    )
    if earlier and after.adapter == "none":
        yield Problem(
            ("adapter",),
            "none, but the stage before trains an adapter on quantised weights, which cannot be trained themselves; "
            "write the adapter once beside stages",
        )
    elif (earlier and earlier.of_weights()) != (own and own.of_weights()):
        wanted = earlier.to_text() if earlier else "none"
        yield Problem(
            ("quantization",),
            f"the stage before trains an adapter with quantization: {wanted}, and this stage goes on with it; write "
            "the same, or write it once beside stages",
        )


def _not_stackable(earlier: LoraAdapter, own: LoraAdapter) -> Iterator[Problem]:
    for key in ("use_dora", "modules_to_save"):
        if getattr(own, key) or getattr(earlier, key):
            yield Problem(
                ("adapter", key), "adapter_per_stage: new needs plain LoRA in every stage; leave it out"
            )
    patterns = [
        isinstance(each.target_modules, str) and each.target_modules != "all-linear"
        for each in (earlier, own)
    ]
    if patterns[0] != patterns[1]:
        yield Problem(
            ("adapter", "target_modules"),
            "adapter_per_stage: new needs a regular expression in every stage or in none; write both in the same way",
        )
