"""How `prefopt check` shows the memory of a run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.training.inspection import Inspection
    from prefopt_cli.training.memory import MemoryEstimate


def print_memory(found: "Inspection", console: "Console") -> None:
    """The peak of one process by part, in training and before it."""
    memory = found.memory
    share = memory.trainable_parameters / memory.parameters
    console.print(
        f"Parameters: {memory.parameters:,}, of which {memory.trainable_parameters:,} ({share:.1%}) are trained."
    )
    print_parts(memory, found.device, console)
    console.print(f"It is {_peak(found)}.", soft_wrap=True)
    _print_before(memory, found, console)
    for note in memory.notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)


def print_parts(memory: "MemoryEstimate", device: str, console: "Console") -> None:
    """A table of the parts, those in the machine's memory below."""
    from rich import box
    from rich.table import Table

    from prefopt_cli.training.memory import format_bytes

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column(f"peak memory per process on {device}, {memory.phase}\n{memory.sharing.describe()}")
    table.add_column("estimate", justify="right", vertical="bottom")
    for part, size in memory.parts.items():
        table.add_row(part, format_bytes(size))
    table.add_row("total", format_bytes(memory.total), style="bold", end_section=bool(memory.host))
    for part, size in memory.host.items():
        table.add_row(f"{part}, in the machine's memory", format_bytes(size))
    console.print(table)


def _print_before(memory: "MemoryEstimate", found: "Inspection", console: "Console") -> None:
    """What a process takes before training."""
    from prefopt_cli.training.memory import format_bytes

    before = sum(memory.before.values())
    if not before:
        return
    what = "the reference scores the data" if found.packing.reference == "cached" else "the layout is tried"
    holds = "the whole model" if memory.whole_before else "a part of the model"
    text = f"Before training, while {what}, it is {format_bytes(before)}: {holds} in each process"
    if memory.needed_before < before:
        text += f"; {format_bytes(memory.needed_before)} would do, as batches that do not fit are halved"
    larger = before > memory.total
    console.print(
        f"{text}.{' That is more than in training.' if larger else ''}", markup=False, soft_wrap=True
    )


def _peak(found: "Inspection") -> str:
    """What the memory estimate is of."""
    if found.memory.phase == "sampling":
        return "there while samples are drawn, those of the longest prompts and as long as they may become"
    if found.memory.phase == "evaluation":
        return "there while an evaluation reads its heaviest batch (training.per_device_eval_batch_size)"
    batch = (
        "that of the heaviest batch of an epoch in random order, with "
        f"{found.packing.heaviest_tokens:,} tokens through the model"
    )
    if found.packing.unscored_tokens is not None:
        batch += ", every response beside the longest degraded versions that may be drawn"
    return batch if found.sampling is None else f"{batch}, and of samples as long as they may become"
