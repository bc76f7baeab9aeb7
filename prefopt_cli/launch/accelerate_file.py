"""A configuration of accelerate's, turned into variables by accelerate itself.

Internals of accelerate's launch command are called here and nowhere else; tests/launch/test_accelerate_file.py fails
loudly when they change.
"""

import logging
import os
import warnings
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal

from prefopt_cli.errors import UserError
from prefopt_cli.launch.addresses import join_endpoint
from prefopt_cli.recipe.launch_settings import LAST_PORT, is_endpoint

UNSUPPORTED = ("tpu", "tpu_use_cluster", "use_megatron_lm")

NOT_ENGINES = ("OMP_NUM_THREADS", "PYTHONPATH", "KMP_AFFINITY", "KMP_BLOCKTIME")
"""What accelerate sets beside; the plan says how many threads a process takes."""


@dataclass(frozen=True)
class AccelerateFile:
    """What such a file asks for."""

    engine: Literal["ddp", "fsdp", "deepspeed"]
    processes: int
    """On each machine."""
    machines: int
    machine_rank: int
    rendezvous: str | None
    variables: dict[str, str]


def read_accelerate_file(path: str) -> AccelerateFile:
    """Let accelerate read its configuration.

    Args:
        path: of the YAML file.

    Raises:
        UserError: accelerate refuses it, or it asks for what prefopt does not train with.
    """
    try:
        _require_keys(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments, defaults, precision_from_file = _parsed(path)
            return _read(arguments, defaults, precision_from_file, path)
    except UserError:
        raise
    except Exception as error:  # accelerate raises whatever its YAML reader or its classes raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"launch.config: {path} is not a configuration that accelerate can use: {words}"
        ) from error


def _require_keys(path: str) -> None:
    """Say of a file without any keys what accelerate would stumble over."""
    import yaml

    with open(path, encoding="utf-8") as file:
        found = yaml.safe_load(file)
    if not isinstance(found, dict):
        what = "is empty" if found is None else "holds no keys"
        raise UserError(
            f"launch.config: {path} {what}; expected a configuration as `accelerate config` writes it."
        )


def _parsed(path: str) -> tuple[Namespace, Any, bool]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    # The program's name is asked for and not used.
    arguments = launch_command_parser().parse_args(["--config_file", path, "prefopt"])
    logger = logging.getLogger("accelerate.commands.launch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it lists the defaults that it took
    try:
        parsed: tuple[Namespace, Any, bool] = _validate_launch_command(arguments)
    finally:
        logger.setLevel(level)
    return parsed


def _read(arguments: Namespace, defaults: Any, precision_from_file: bool, path: str) -> AccelerateFile:
    if any(getattr(arguments, name, False) for name in UNSUPPORTED) or not hasattr(
        defaults, "main_process_ip"
    ):
        raise UserError(
            f"launch.config: {path} asks for what prefopt does not train with; distributed_type may be MULTI_GPU, "
            "MULTI_CPU, FSDP, DEEPSPEED or NO."
        )
    machines, total = int(arguments.num_machines or 1), int(arguments.num_processes or 1)
    if total % machines:
        raise UserError(
            f"launch.config: {path} shares {total} processes (num_processes) among {machines} machines, and they do "
            "not divide."
        )
    rank = int(arguments.machine_rank or 0)
    rendezvous = _rendezvous(arguments, path) if machines > 1 else None
    return AccelerateFile(
        engine="deepspeed" if arguments.use_deepspeed else "fsdp" if arguments.use_fsdp else "ddp",
        processes=total // machines,
        machines=machines,
        machine_rank=rank,
        rendezvous=rendezvous,
        variables=_variables(arguments, defaults, precision_from_file),
    )


def _rendezvous(arguments: Namespace, path: str) -> str | None:
    """host:port of machine 0, where the file says it."""
    if not arguments.main_process_ip:
        return None
    endpoint = join_endpoint(str(arguments.main_process_ip), int(arguments.main_process_port or 29500))
    if not is_endpoint(endpoint):
        raise UserError(
            f"launch.config: {path}: main_process_ip and main_process_port make {endpoint}, which is no place to "
            f"meet; expected a host or an address, and a port up to {LAST_PORT}."
        )
    return endpoint


def _variables(arguments: Namespace, defaults: Any, precision_from_file: bool) -> dict[str, str]:
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # Where the machines meet is not its business here: it would try the port, or start DeepSpeed's own launcher.
    arguments.num_machines, arguments.main_process_port = 1, 0
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if precision_from_file else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    changed = {name: value for name, value in changed.items() if name not in NOT_ENGINES}
    on_cpu = getattr(arguments, "use_cpu", False) or arguments.cpu
    return {**changed, **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}
