"""The ``launch`` section: on how many processes and machines a run takes place, and how they share the work."""

import re
from typing import Literal

from pydantic import Field, field_validator

from prefopt_cli.recipe.section import Section

ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
"""host:port; an IPv6 address stands in brackets."""

LAST_PORT = 65534
"""The launchers of several machines meet at the next one."""


Engine = Literal["ddp", "fsdp", "deepspeed"]


def is_endpoint(text: str) -> bool:
    """Whether a text is host:port, with a port after which there is another one."""
    found = ENDPOINT.fullmatch(text)
    return found is not None and 1 <= int(found[2]) <= LAST_PORT


class LaunchSettings(Section):
    """How the run is started. A run that torchrun, accelerate or Slurm has started already starts no more processes."""

    processes: int | Literal["auto"] = Field(
        default=1, description="Processes on each machine; auto: one for every GPU."
    )
    engine: Engine = Field(
        default="ddp",
        description="How processes share the work. ddp: each holds the whole model; fsdp: weights, gradients and "
        "optimizer are sharded (FSDP2); deepspeed: ZeRO.",
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=2,
        description="With deepspeed, what is sharded: the optimizer (1), gradients too (2), weights too (3).",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="With fsdp, give gathered weights back between forward and backward: less memory, more traffic.",
    )
    cpu_offload: bool = Field(
        default=False,
        description="With fsdp or deepspeed, keep shards and optimizer in the machine's memory: slow.",
    )
    config: str | None = Field(
        default=None,
        min_length=1,
        description="An accelerate configuration (YAML) or, with deepspeed, DeepSpeed's (JSON) to use as it is.",
    )
    machines: int = Field(default=1, ge=1, description="Machines that train together.")
    machine_rank: int = Field(default=0, ge=0, description="Which of them this one is, from 0.")
    rendezvous: str | None = Field(
        default=None,
        description="host:port at which machine 0 is reached by all, for example 10.0.0.1:29500; the next port is "
        "used too.",
    )
    timeout: int = Field(
        default=300,
        ge=1,
        description="Seconds to wait for other machines at the start, and for one that has fallen silent.",
    )

    @field_validator("processes")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"expected at least 1, or auto, found {value}")
        return value

    @field_validator("rendezvous")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not is_endpoint(value):
            raise ValueError(
                f"expected host:port, for example 10.0.0.1:29500, with a port up to {LAST_PORT}, found {value!r}"
            )
        return value


def given(settings: LaunchSettings) -> frozenset[str]:
    """The settings that the user has written down, defaults among them.

    Runs of earlier versions spell every setting out in their recipe.yaml: there only what is no default says anything.
    """
    names = frozenset(settings.model_fields_set)
    fields = LaunchSettings.model_fields
    if not names.issuperset(fields):
        return names
    return frozenset(name for name in names if getattr(settings, name) != fields[name].default)
