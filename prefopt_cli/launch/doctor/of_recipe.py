"""What one recipe needs of this machine: its model and data, its output folder, its processes, its rendezvous."""

import os
import shlex
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
from prefopt_cli.launch.resolving import NO_MEETING_PLACE, ONE_PROCESS, launch_here
from prefopt_cli.models.policy import find_policy
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.launch_checks import cannot_be_sharded
from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.recipe.schema import QuantizationSettings, Recipe
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
    yield from _launch(path, recipe)


def _launch(path: str, recipe: Recipe) -> Iterator[Finding]:
    """Whether its processes can be started here."""
    try:
        launch = launch_here(recipe.launch)
    except UserError as error:
        yield problem(
            str(error), f"put it right; prefopt launch print {shlex.quote(path)} shows what it comes to"
        )
        return
    settings = launch.settings
    if recipe.launch.config is not None and settings.config is None:
        yield ok(f"launch.config {recipe.launch.config} can be used: {_described(settings)}")
    if settings.engine == "deepspeed" != recipe.launch.engine:
        yield _installed("launch.config: deepspeed", "deepspeed", "leave launch.config out")
    yield from _sharding(recipe, settings)
    yield from _processes(settings, on_cpu=bool(recipe.training.get("use_cpu")) or launch.on_cpu)
    if settings.machines > 1 and settings.rendezvous is None:
        yield note(
            NO_MEETING_PLACE, "add it, unless Slurm or SkyPilot starts the machines and says where they meet"
        )
    elif settings.machines > 1:
        yield from rendezvous(str(settings.rendezvous), settings.machine_rank)


def _described(settings: LaunchSettings) -> str:
    each = f"processes: {settings.processes}, engine: {settings.engine}"
    return f"{each}, machines: {settings.machines}" if settings.machines > 1 else each


def _sharding(recipe: Recipe, settings: LaunchSettings) -> Iterator[Finding]:
    """Whether the engine that launch.config asks for can take apart what the recipe quantises."""
    if recipe.launch.config is None or not isinstance(recipe.quantization, QuantizationSettings):
        return
    if cannot_be_sharded(recipe.quantization, settings.engine, settings.zero_stage):
        yield problem(
            f"launch.config asks for {settings.engine}, which takes weights apart, and those of "
            f"{recipe.quantization.bits} bits do not bear it",
            "leave launch.config out, or quantization",
        )


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
        if name not in ("none", "all"):
            yield _installed(f"training.report_to: {name}", PACKAGES.get(name, name), "report_to: none")


def _installed(asks: str, package: str, otherwise: str) -> Finding:
    """Whether a package is there that a setting asks for."""
    try:
        return ok(f"{asks} {metadata.version(package)}")
    except metadata.PackageNotFoundError:
        return problem(f"{asks} is not installed", f"pip install {package}, or {otherwise}")


def _processes(settings: LaunchSettings, *, on_cpu: bool) -> Iterator[Finding]:
    """Whether there is a GPU for each; without any, processes share the CPU. And whether there are enough to shard."""
    wanted = settings.processes
    there = 0 if on_cpu or wanted == 1 else count_accelerators()
    started = max(there, 1) if wanted == "auto" else wanted
    if settings.engine == "fsdp" and started == settings.machines == 1 and "WORLD_SIZE" not in os.environ:
        yield problem(ONE_PROCESS, "launch.processes=2 or more, or launch.engine=ddp")
    if on_cpu or wanted == 1:
        return
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
