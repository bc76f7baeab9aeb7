"""An engine with its settings, in the variables by which accelerate is told of it; and read back from them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from prefopt_cli.launch.deepspeed_file import read_deepspeed_file
from prefopt_cli.recipe.launch_settings import Engine, LaunchSettings

USES: dict[Engine, str] = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
"""accelerate's variable that asks for an engine."""

OF_AN_ENGINE = ("FSDP_", "ACCELERATE_DEEPSPEED_")
"""How variables begin that say how an engine works."""

DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"

ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"

OFFLOADS = {
    "optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}

STANDARD_STAGE = 2
"""accelerate's where nothing is said."""

DEVICE_OF_WEIGHTS = 3
"""The ZeRO stage from which on weights are sharded, and may lie elsewhere."""


@dataclass(frozen=True)
class EngineFacts:
    """How an engine shares a model, as its variables have it."""

    engine: Engine
    zero_stage: int = STANDARD_STAGE
    """0: DeepSpeed shards nothing."""
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    """Whether all that is sharded lies in the machine's memory."""
    besides: tuple[str, ...] = ()
    """What else they ask for that changes memory, in words of accelerate's and DeepSpeed's configurations."""


def engine_asked(variables: Mapping[str, str]) -> Engine:
    """The engine that an environment asks for."""
    for name, variable in USES.items():
        if _is_yes(variables.get(variable, "false")):
            return name
    return "ddp"


def engine_facts(variables: Mapping[str, str]) -> EngineFacts:
    """What an environment asks of its engine.

    Args:
        variables: all of it.

    Raises:
        UserError: a file of DeepSpeed's that it names cannot be used.
    """
    engine = engine_asked(variables)
    besides = []
    if variables.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        besides.append(f"mixed_precision: {variables['ACCELERATE_MIXED_PRECISION']}")
    if engine == "deepspeed":
        return _of_deepspeed(variables, besides)
    if engine == "fsdp":
        if _is_yes(variables.get("FSDP_ACTIVATION_CHECKPOINTING", "false")):
            besides.append("fsdp_activation_checkpointing: true")
        return EngineFacts(
            engine,
            reshard_after_forward=_is_yes(variables.get("FSDP_RESHARD_AFTER_FORWARD", "true")),
            cpu_offload=_is_yes(variables.get("FSDP_OFFLOAD_PARAMS", "false")),
            besides=tuple(besides),
        )
    return EngineFacts(engine, besides=tuple(besides))


def facts_in_a_process(variables: Mapping[str, str]) -> EngineFacts | None:
    """As `engine_facts`, in a process that a launcher started; None where that gives DeepSpeed's file by its content.

    Raises:
        UserError: as of `engine_facts`.
    """
    file = variables.get(DEEPSPEED_FILE, "none")
    return engine_facts(variables) if file == "none" or os.path.isfile(file) else None


def _of_deepspeed(variables: Mapping[str, str], besides: list[str]) -> EngineFacts:
    text = variables.get(ZERO_STAGE, "")
    stage = int(text) if text.isdecimal() else STANDARD_STAGE
    optimizer, weights = (variables.get(name, "none").lower() for name in OFFLOADS.values())
    path = variables.get(DEEPSPEED_FILE, "none")
    if path != "none":
        found = read_deepspeed_file(path)
        stage = stage if found.zero_stage is None else found.zero_stage
        optimizer, weights = found.optimizer_on, found.weights_on
    devices = (optimizer, weights) if stage >= DEVICE_OF_WEIGHTS else (optimizer,)
    in_memory = set(devices) == {"cpu"}
    if not in_memory:
        named = zip(OFFLOADS, devices, strict=False)
        besides += [f"offload_{name}: {device}" for name, device in named if device != "none"]
    return EngineFacts("deepspeed", zero_stage=stage, cpu_offload=in_memory, besides=tuple(besides))


def chosen(engine: str) -> dict[str, str]:
    """The environment that tells each engine whether it is the one: what a shell has exported does not decide.

    Args:
        engine: ddp, fsdp or deepspeed.
    """
    return {variable: _yes(name == engine) for name, variable in USES.items()}


def engine_variables(settings: LaunchSettings) -> dict[str, str]:
    """How the chosen engine works, in the environment; empty for ddp, of which there is nothing to say.

    Of `launch.config` only DeepSpeed's own (JSON) is looked at: accelerate reads its own.
    """
    if settings.engine == "fsdp":
        return _fsdp(settings)
    if settings.engine == "deepspeed":
        return _deepspeed(settings)
    return {}


def _fsdp(settings: LaunchSettings) -> dict[str, str]:
    return {
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": _yes(settings.reshard_after_forward),
        "FSDP_OFFLOAD_PARAMS": _yes(settings.cpu_offload),
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        # Under an adapter the policy scores the data as a whole model before it is sharded.
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",  # training.gradient_checkpointing is the one that decides
    }


def _deepspeed(settings: LaunchSettings) -> dict[str, str]:
    if settings.config is not None:
        return {DEEPSPEED_FILE: settings.config}
    weights_too = settings.zero_stage >= DEVICE_OF_WEIGHTS
    offloaded = "cpu" if settings.cpu_offload else "none"
    return {
        DEEPSPEED_FILE: "none",  # as accelerate has it
        ZERO_STAGE: str(settings.zero_stage),
        OFFLOADS["optimizer"]: offloaded,
        OFFLOADS["param"]: offloaded if weights_too else "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",  # the whole model scores the data before it is sharded
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": _yes(weights_too),
    }


def _yes(value: bool) -> str:
    return str(value).lower()


def _is_yes(text: str) -> bool:
    return text.lower() in ("true", "1")
