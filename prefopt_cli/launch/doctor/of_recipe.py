"""What one recipe needs of this machine: its model and data, its output folder, its processes, its rendezvous."""

import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from huggingface_hub import constants, get_token, try_to_load_from_cache

from prefopt_cli.errors import UserError
from prefopt_cli.launch.devices import count_accelerators
from prefopt_cli.launch.doctor import hub
from prefopt_cli.launch.doctor.checkpoints import checkpoint_bytes, shapes
from prefopt_cli.launch.doctor.finding import Finding, gibibytes, note, ok, problem
from prefopt_cli.launch.doctor.rendezvous import rendezvous
from prefopt_cli.models.policy import find_policy
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.schemes import has_scheme
from prefopt_cli.runs.folder import RunFolder

OFFLINE = "hf download {name} on a machine with access, and copy its cache; or unset HF_HUB_OFFLINE"
FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz")
PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow"}
"""Of integrations whose package has another name."""


def of_recipe(path: str, overrides: Sequence[str]) -> Iterator[Finding]:
    """Everything that only this recipe needs, and that can be seen without loading a model."""
    recipe = load_recipe(path, overrides)
    yield ok(f"{path} is sound")
    place, found = _model(recipe)
    yield found
    yield from _data(recipe)
    yield from _output(recipe, place)
    yield from _reports(recipe)
    yield from _processes(recipe)
    if recipe.launch.rendezvous is not None and recipe.launch.machines > 1:
        yield from rendezvous(recipe.launch.rendezvous, recipe.launch.machine_rank)


def _model(recipe: Recipe) -> tuple[Path | None, Finding]:
    """The folder of the full weights, where they are on this machine; and whether they can be had."""
    name = recipe.model.name_or_path
    if has_scheme(name):
        return None, ok(f"model {name} is made on the spot")
    try:
        source = find_policy(recipe.model)
    except UserError as error:
        return None, problem(
            str(error), "set model.name_or_path to a folder, a run or a hub id that is there"
        )
    if source.is_local:
        return Path(source.weights), ok(f"model {source.describe()} is on this machine")
    cached = try_to_load_from_cache(source.weights, "config.json", revision=recipe.model.revision or "main")
    if isinstance(cached, str):
        return Path(cached).parent, ok(f"model {source.weights} is in the hub's cache")
    revision = recipe.model.revision or "main"
    return None, _on_hub("model", source.weights, f"/{source.weights}/resolve/{revision}/config.json")


def _on_hub(kind: str, name: str, path: str) -> Finding:
    if constants.is_offline_mode():
        return problem(
            f"{kind} {name} is not in the cache, and HF_HUB_OFFLINE is set", OFFLINE.format(name=name)
        )
    status, _, trouble = hub.ask(path, get_token(), "HEAD")
    if status is None:
        return problem(
            f"{kind} {name} is not on this machine, and the hub does not answer ({trouble})", hub.UNREACHABLE
        )
    if status in (401, 403):
        return problem(
            f"{kind} {name} is gated or private, or there is none of this name: the hub refuses it",
            f"hf auth login, after asking for access at {hub.endpoint()}/{'datasets/' * (kind == 'data')}{name}",
        )
    if status == 404:
        return problem(f"{kind} {name}: the hub has none of this name", "check its spelling and revision")
    return ok(f"{kind} {name} is on the hub and will be downloaded")


def _data(recipe: Recipe) -> Iterator[Finding]:
    sources = [
        *recipe.dataset.train,
        *(each for eval_set in recipe.dataset.eval.values() for each in eval_set),
    ]
    for name in dict.fromkeys(source.source for source in sources):
        path = Path(name).expanduser()
        if has_scheme(name):
            yield ok(f"data {name} is made on the spot")
        elif path.exists():
            yield ok(f"data {name} is on this machine")
        elif path.suffix in FILES or name.count("/") > 1 or name.startswith((".", "~")):
            yield problem(f"data {name} is not there", f"put it there: {path.absolute()}")
        else:
            yield _on_hub("data", name, f"/api/datasets/{name}")


def _output(recipe: Recipe, place: Path | None) -> Iterator[Finding]:
    run = RunFolder(Path(recipe.output_dir).expanduser())
    try:
        run.require_writable()
    except UserError as error:
        yield problem(str(error), "set output_dir to another folder")
        return
    try:
        run.require_free(overwrite=False)
    except UserError as error:
        yield note(str(error), "prefopt train RECIPE --resume, or --overwrite, or another output_dir")
    existing = next(each for each in (run.path.absolute(), *run.path.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(existing).free
    each = checkpoint_bytes(recipe, shapes(place)) if place is not None else 0
    if not each:
        yield ok(f"output_dir {run.path} can be written, {gibibytes(free)} free")
        return
    limit = recipe.training.get("save_total_limit")
    # A new checkpoint is written before the oldest one goes.
    wanted = each * ((limit or 1) + 1)
    text = f"a checkpoint takes about {gibibytes(each)}, and {gibibytes(free)} are free for {run.path}"
    fewer = "free some, set output_dir to a larger disk, or training.save_total_limit=1"
    if free < wanted:
        yield problem(f"{text}: too little for {(limit or 1) + 1} of them", fewer)
    elif limit is None and free < 10 * each:
        yield note(
            f"{text}: room for {free // each} of them, and training.save_total_limit sets no limit", fewer
        )
    else:
        yield ok(text)


def _reports(recipe: Recipe) -> Iterator[Finding]:
    asked = recipe.training.get("report_to") or []
    for name in [asked] if isinstance(asked, str) else asked:
        package = PACKAGES.get(name, name)
        if name in ("none", "all"):
            continue
        try:
            yield ok(f"training.report_to: {name} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield problem(
                f"training.report_to: {name} is not installed", f"pip install {package}, or report_to: none"
            )


def _processes(recipe: Recipe) -> Iterator[Finding]:
    """Whether there is a GPU for each; without any, processes share the CPU."""
    wanted, on_cpu = recipe.launch.processes, recipe.training.get("use_cpu")
    if on_cpu or wanted == 1:
        return
    there = count_accelerators()
    if wanted == "auto":
        text = f"one for each of {there} GPUs" if there else "one, as there is no GPU"
        yield ok(f"launch.processes: auto starts {text}")
    elif there and there < int(wanted):
        yield problem(
            f"launch.processes is {wanted}, and there are {there} GPUs", "set launch.processes=auto"
        )
    elif not there:
        yield note(
            f"launch.processes is {wanted}, and there is no GPU: they share the CPU",
            "set launch.processes=1, unless this is a trial",
        )
    else:
        yield ok(f"launch.processes is {wanted}, and there are {there} GPUs")
