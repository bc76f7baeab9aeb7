"""The peak of one process's memory, taken apart."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from prefopt_cli.training.memory_engines import ALONE, Sharing
from prefopt_cli.training.memory_stand_ins import Device

ALLOCATOR_SHARE = {"cpu": 0.15, "cuda": 0.0}
"""What the allocator keeps of freed memory, as a share of what is alive. A rule of thumb for glibc, which kept
7 to 43 % in runs of TRL's trainer; PyTorch's own figures of CUDA memory leave it out."""

ALLOCATOR = "kept by the allocator"

Phase = Literal["forward and backward", "optimizer step", "sampling", "evaluation"]

_ORDER = (
    "weights",
    "frozen policy",
    "gradients",
    "optimizer",
    "activations",
    "recomputed activations",
    "LM head",
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one process in a training step (from the second step on), taken apart."""

    parts: dict[str, int]
    """Bytes by part at the peak: weights, frozen policy, gradients, optimizer, activations, LM head, ..."""
    parameters: int
    """Numbers in the policy, tied weights counted once, adapter included; in all processes together."""
    trainable_parameters: int
    """Those that are trained."""
    phase: Phase
    """When the peak is."""
    method: Literal["traced", "formula"]
    """traced: every allocation of a step was followed; formula: only a rule of thumb for the activations."""
    notes: tuple[str, ...] = ()
    """What the reader should know about the estimate, one sentence each."""
    sharing: Sharing = ALONE
    """The engine, and how many processes share the work."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes by part that the process holds in the machine's memory instead of the device's."""
    before: dict[str, int] = field(default_factory=dict)
    """Bytes by part at the peak before training, when frozen policies score the data; empty: not known."""
    whole_before: bool = True
    """Whether every process holds the whole model then."""
    needed_before: int = 0
    """Bytes that must be there before training: larger batches of scoring are halved where they do not fit."""

    @property
    def total(self) -> int:
        """Bytes at the peak of training."""
        return sum(self.parts.values())

    @property
    def alive(self) -> int:
        """Bytes of tensors alive at the peak: the total without what the allocator keeps."""
        return self.total - self.parts.get(ALLOCATOR, 0)

    @property
    def needed(self) -> int:
        """Bytes without which the run fails, in training or before it."""
        return max(self.total, self.needed_before)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "total": self.total, "needed": self.needed}


def with_allocator(parts: Mapping[str, int], device: Device) -> dict[str, int]:
    """Parts with what the allocator keeps beside them, in the order in which they are shown."""
    return ordered({**parts, ALLOCATOR: round(ALLOCATOR_SHARE[device] * sum(parts.values()))})


def format_bytes(count: int) -> str:
    """Bytes for people: ``512 B``, ``3.4 MiB``, ``15.0 GiB``."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def ordered(parts: Mapping[str, int]) -> dict[str, int]:
    """What stays first, then what passes, largest first; nothing that is zero."""
    rest = sorted(set(parts) - set(_ORDER), key=lambda part: -parts[part])
    return {part: parts[part] for part in (*_ORDER, *rest) if parts.get(part)}
