"""An engine with its settings, in the variables by which accelerate is told of it."""

from prefopt_cli.recipe.launch_settings import LaunchSettings

USES = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
"""accelerate's variable that asks for an engine."""


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
        return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": settings.config}
    weights_too = settings.zero_stage == 3
    offloaded = "cpu" if settings.cpu_offload else "none"
    return {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",  # as accelerate has it
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(settings.zero_stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": offloaded,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": offloaded if weights_too else "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",  # the whole model scores the data before it is sharded
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": _yes(weights_too),
    }


def _yes(value: bool) -> str:
    return str(value).lower()
