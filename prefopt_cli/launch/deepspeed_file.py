"""DeepSpeed's own configuration (JSON), as far as it decides how a model is shared."""

import json
from dataclasses import dataclass
from typing import Any

from prefopt_cli.errors import UserError

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class DeepSpeedFile:
    """What such a file asks for."""

    zero_stage: int | None
    """0 shards nothing; None: the file leaves it to accelerate ("auto")."""
    optimizer_on: str
    """Device of the optimizer's states: none (the model's), cpu or nvme."""
    weights_on: str
    """Device of sharded weights."""


def read_deepspeed_file(path: str) -> DeepSpeedFile:
    """Read DeepSpeed's configuration.

    Args:
        path: of the JSON file.

    Raises:
        UserError: there is none, it is no JSON, or its zero_optimization is nothing that DeepSpeed knows.
    """
    zero = _mapping(_parsed(path).get("zero_optimization"), "zero_optimization", path)
    stage = zero.get("stage", 0)
    if stage != "auto" and (isinstance(stage, bool) or stage not in STAGES):
        raise UserError(
            f"launch.config: {path}: zero_optimization.stage: expected 0, 1, 2 or 3, found {stage!r}."
        )
    return DeepSpeedFile(
        zero_stage=None if stage == "auto" else int(stage),
        optimizer_on=_device(zero, "offload_optimizer", path),
        weights_on=_device(zero, "offload_param", path),
    )


def _parsed(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        raise UserError(f"launch.config: there is no file {path}.") from None
    except OSError as error:
        raise UserError(f"launch.config: {path} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"launch.config: {path}:{error.lineno}: this is no JSON: {error.msg} (column {error.colno})."
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"launch.config: {path}: this is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"launch.config: {path} holds no keys; expected DeepSpeed's configuration.")
    return found


def _device(zero: dict[str, Any], name: str, path: str) -> str:
    place = f"zero_optimization.{name}"
    return str(_mapping(zero.get(name), place, path).get("device") or "none").lower()


def _mapping(value: Any, name: str, path: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"launch.config: {path}: {name}: expected a mapping, found {value!r}.")
    return value or {}
