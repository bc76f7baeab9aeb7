"""What the section `launch` comes to once its file is read: one answer for train, check and doctor."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.launch.accelerate_file import AccelerateFile, read_accelerate_file
from prefopt_cli.launch.engine_variables import (
    OF_AN_ENGINE,
    EngineFacts,
    chosen,
    engine_asked,
    engine_facts,
    engine_variables,
    facts_in_a_process,
)
from prefopt_cli.launch.environment import started_by, with_slurm
from prefopt_cli.recipe.launch_checks import OF_ENGINES
from prefopt_cli.recipe.launch_settings import LaunchSettings, given

ONE_PROCESS = (
    "launch.engine: fsdp shards a model over several processes, and there is one. Start several (launch.processes, or "
    "the option of torchrun or accelerate), or leave the engine out."
)

NO_MEETING_PLACE = (
    "launch.machines: several machines must know where to meet; add launch.rendezvous: HOST:PORT of machine 0"
)


@dataclass(frozen=True)
class ResolvedLaunch:
    """The settings with what Slurm and `launch.config` say where they say nothing."""

    settings: LaunchSettings
    """Their `config` is None: it has been read. With DeepSpeed's JSON `zero_stage` may be 0, which shards nothing."""
    variables: dict[str, str]
    """The environment by which accelerate is told of the engine."""
    besides: tuple[str, ...] = ()
    """What the file asks for that changes memory and that no setting says."""

    @property
    def on_cpu(self) -> bool:
        """Whether the file keeps off accelerators."""
        return self.variables.get("ACCELERATE_USE_CPU") == "true"

    @property
    def one_process(self) -> bool:
        """Whether there is one on all machines, for certain."""
        return self.settings.processes == 1 and self.settings.machines == 1


def resolve_launch(settings: LaunchSettings, environ: Mapping[str, str] = os.environ) -> ResolvedLaunch:
    """Read `launch.config`, and lay over it what the user has given.

    Several machines may still lack a place to meet, which Slurm or a script may supply; see `NO_MEETING_PLACE`.

    Args:
        settings: the recipe's.
        environ: the environment's variables.

    Raises:
        UserError: the file is not there or cannot be used, or it contradicts the settings.
    """
    return _with_file(with_slurm(settings, environ), environ)


def launch_here(settings: LaunchSettings) -> ResolvedLaunch:
    """As `resolve_launch`; where a launcher started this process, it alone says how many there are and where.

    Raises:
        UserError: as of `resolve_launch`.
    """
    return resolve_launch(settings) if started_by() is None else _with_file(settings, os.environ)


def adopt_engine(settings: LaunchSettings, environ: MutableMapping[str, str] = os.environ) -> None:
    """In a process of another launcher's that asks for no engine, as torchrun does not: ask for the recipe's.

    Raises:
        UserError: as of `resolve_launch`, or the launcher asks for another engine or engine's setting than the recipe.
    """
    launcher = started_by(environ)
    if launcher in (None, "prefopt"):
        return
    asked = engine_asked(environ)
    if asked == "ddp":
        found = _with_file(settings, environ)
        for name, value in found.variables.items():
            # The engine's own words go together; of the rest, such as devices, what the launcher says stays.
            if name.startswith(OF_AN_ENGINE) or (name.startswith("ACCELERATE_") and name not in environ):
                environ[name] = value
        environ.update(chosen(found.settings.engine))
        return
    if "engine" in given(settings) and settings.engine != asked:
        raise UserError(
            f"launch.engine: {settings.engine}, but the environment in which {launcher} started this process asks for "
            f"{asked}; leave the engine out of one of them."
        )
    facts = facts_in_a_process(environ)
    if facts is not None:
        _require_agreement(settings, facts, f"the environment of {launcher}")


def _with_file(settings: LaunchSettings, environ: Mapping[str, str]) -> ResolvedLaunch:
    if settings.config is None:
        return ResolvedLaunch(settings, engine_variables(settings))
    path = Path(settings.config).expanduser()
    if path.is_dir():
        raise UserError(f"launch.config: {path} is a folder; name the file in it.")
    if not path.is_file():
        raise UserError(f"launch.config: there is no file {path}.")
    if path.suffix == ".json":
        return _with_deepspeed_file(settings, path, environ)
    return _with_accelerate_file(settings, path, environ)


def _with_deepspeed_file(settings: LaunchSettings, path: Path, environ: Mapping[str, str]) -> ResolvedLaunch:
    if settings.engine != "deepspeed":
        raise UserError(
            f"launch.config: {path} is taken for DeepSpeed's (JSON), and the engine is {settings.engine}; add "
            "launch.engine: deepspeed, or give an accelerate configuration (YAML)."
        )
    variables = engine_variables(settings.model_copy(update={"config": str(path.resolve())}))
    return _resolved(settings, {}, variables, path, environ)


def _with_accelerate_file(settings: LaunchSettings, path: Path, environ: Mapping[str, str]) -> ResolvedLaunch:
    found = read_accelerate_file(str(path))
    wanted = given(settings)
    if "engine" in wanted and settings.engine != found.engine:
        raise UserError(
            f"launch.engine: {settings.engine}, but {path} (launch.config) asks for {found.engine}; leave the engine "
            "out, or change the file."
        )
    alone = "machines" in wanted and settings.machines == 1  # which needs no rank and no place to meet
    update = {name: value for name, value in _of_processes(found, alone=alone).items() if name not in wanted}
    update["engine"] = found.engine
    return _resolved(settings, update, found.variables, path, environ)


def _of_processes(found: AccelerateFile, *, alone: bool) -> dict[str, Any]:
    if alone:
        return {"processes": found.processes}
    return {
        "processes": found.processes,
        "machines": found.machines,
        "machine_rank": found.machine_rank,
        "rendezvous": found.rendezvous,
    }


def _resolved(
    settings: LaunchSettings,
    update: dict[str, Any],
    variables: dict[str, str],
    path: Path,
    environ: Mapping[str, str],
) -> ResolvedLaunch:
    """The settings with the file's, which they must not contradict."""
    engine = update.get("engine", settings.engine)
    environment = {**environ, **variables, **chosen(engine)}
    if engine == "fsdp" and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            f"launch.config: {path} asks for FSDP 1, which PyTorch has given up; set fsdp_version: 2 in it."
        )
    facts = engine_facts(environment)
    _require_agreement(settings, facts, f"{path} (launch.config)")
    shared = {name: getattr(facts, name) for name in OF_ENGINES}
    merged = settings.model_copy(update={**update, **shared, "config": None})
    if merged.machine_rank >= merged.machines:
        raise UserError(
            f"launch.machine_rank: expected less than the number of machines ({merged.machines}, as launch.machines "
            f"or {path} has it), as ranks begin at 0, found {merged.machine_rank}."
        )
    return ResolvedLaunch(merged, variables, facts.besides)


def _require_agreement(settings: LaunchSettings, facts: EngineFacts, source: str) -> None:
    for name, engines in OF_ENGINES.items():
        value, found = getattr(settings, name), getattr(facts, name)
        if name in given(settings) and facts.engine in engines and value != found:
            raise UserError(
                f"launch.{name}: {_words(value)}, but {source} comes to {_words(found)} and is used as it is; say it "
                "there alone."
            )


def _words(value: Any) -> str:
    return str(value).lower()
