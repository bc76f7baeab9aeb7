"""What a job asks Slurm for: options, what is assumed where the user says nothing, and how directives are written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt_cli.errors import UserError
from prefopt_cli.launch.batch_script import Work, require_one_line

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
GPUS = re.compile(r"(?:[A-Za-z0-9._-]+:)?(\d+)")
MEMORY = re.compile(r"\d+(?:\.\d+)?[KMGT]?", re.IGNORECASE)
DIRECTIVE = re.compile(r"[a-z][a-z-]*(?:=.+)?")
PLAIN = re.compile(r"[A-Za-z0-9%+,./:=@_^-]*")
"""What sbatch reads in a directive as it stands; elsewhere it knows comments, quotes and backslashes."""

CORES_PER_GPU = 8
"""The process, its tokenisation and its loaders; most machines with GPUs have more."""
MEMORY_PER_GPU = 40
"""Slurm's G. Each process reads the whole model into memory first: 8 billion weights of 4 bytes are 32."""

OWN_OPTIONS = ("nodes", "gpus-per-node", "cpus-per-task", "mem", "time", "partition", "account")
"""Options of sbatch that `prefopt launch slurm` has too, by which it writes more than the directive."""
FIXED = ("array", "ntasks", "ntasks-per-node", "signal")
"""Options of sbatch without whose values the script does not work."""


@dataclass(frozen=True)
class SlurmOptions:
    """What the job asks Slurm for."""

    nodes: int
    gpus_per_node: str | None = None
    """A number, or a type and a number: a100:4; None or 0: no GPUs."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    mem: str | None = None
    """Of a node; 0: all that it has."""
    cpus_per_task: int | None = None
    container: str | None = None
    """Image for pyxis/enroot, in which prefopt is installed."""
    container_mounts: Sequence[str] = ()
    """HOST or HOST:CONTAINER, besides what the script mounts by itself."""
    directives: Sequence[str] = ()
    """Further options of sbatch, without their dashes: qos=high."""
    setup: Sequence[str] = ()
    """Lines of shell before the run: module load cuda."""

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        found = GPUS.fullmatch(self.gpus_per_node or "0")
        return int(found[1]) if found else 0

    @property
    def directive_names(self) -> set[str]:
        """Of the further options."""
        return {directive.partition("=")[0] for directive in self.directives}


def with_defaults(options: SlurmOptions, work: Work) -> tuple[SlurmOptions, str | None]:
    """Cores and memory where nothing is said of them: by itself Slurm gives one core, and memory for it.

    With GPUs, a node's cores and memory are `CORES_PER_GPU` and `MEMORY_PER_GPU` times their number, or all memory of
    nodes that are the job's alone (`exclusive`); without, there is a core for each process, and the memory is left to
    the cluster.

    Returns:
        The options with them, and a line that tells the user what was assumed; None where nothing was.
    """
    gpus, given, assumed = options.gpus, options.directive_names, []
    if options.cpus_per_task is None and "cpus-per-gpu" not in given:
        processes = work.launch.processes
        cores = gpus * CORES_PER_GPU or (processes if isinstance(processes, int) else None)
        if cores is not None:
            options = replace(options, cpus_per_task=cores)
            each = f"{CORES_PER_GPU} for each GPU" if gpus else "one for each process"
            assumed.append(f"{_cores(cores)} ({each}; --cpus-per-task)")
    if options.mem is None and not given & {"mem-per-cpu", "mem-per-gpu"}:
        if gpus and "exclusive" in given:
            options = replace(options, mem="0")
            assumed.append("all its memory (--mem)")
        elif gpus:
            options = replace(options, mem=f"{gpus * MEMORY_PER_GPU}G")
            assumed.append(f"{options.mem} of memory ({MEMORY_PER_GPU}G for each GPU; --mem)")
        else:
            assumed.append("what memory the cluster gives (--mem)")
    if not assumed:
        return options, None
    whole = (
        " For whole nodes: --sbatch exclusive."
        if gpus and options.nodes > 1 and "exclusive" not in given
        else ""
    )
    return options, f"Assumed for each node: {' and '.join(assumed)}.{whole}"


def _cores(number: int) -> str:
    return f"{number} core{'s' if number > 1 else ''}"


def time_limit(text: str) -> int | None:
    """Seconds of a time limit as Slurm writes it; None for no limit.

    Raises:
        UserError: it is none.
    """
    if text.lower() in ("unlimited", "infinite"):
        return None
    found = TIME.fullmatch(text)
    if found is None:
        raise UserError(f"--time: expected minutes, HH:MM:SS or D-HH:MM:SS, found {text!r}.")
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def sbatch_line(name: str, value: str | None) -> str:
    """A directive as sbatch reads it again, whatever is in its value; None for an option without one."""
    if value is None:
        return f"#SBATCH --{name}"
    if not PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={value}"


def check_options(options: SlurmOptions) -> None:
    """Refuse what would not do in a batch script.

    Raises:
        UserError: an option is nothing that Slurm understands, or a directive is none that the script can live with.
    """
    for name in ("partition", "account", "container"):
        value = getattr(options, name)
        if value is not None:
            require_one_line(f"--{name}", value)
            if any(letter.isspace() for letter in value):
                raise UserError(f"--{name}: expected a name without spaces, found {value!r}.")
    if options.gpus_per_node is not None and not GPUS.fullmatch(options.gpus_per_node):
        raise UserError(f"--gpus-per-node: expected 8 or TYPE:8, found {options.gpus_per_node!r}.")
    if options.mem is not None and not MEMORY.fullmatch(options.mem):
        raise UserError(f"--mem: expected a number and K, M, G or T, as in 64G, found {options.mem!r}.")
    for line in options.setup:
        require_one_line("--setup", line)
    for directive in options.directives:
        _check_directive(directive)


def _check_directive(directive: str) -> None:
    require_one_line("--sbatch", directive)
    if not DIRECTIVE.fullmatch(directive):
        raise UserError(
            f"--sbatch: expected an option of sbatch without its dashes, as in qos=high, found {directive!r}."
        )
    name = directive.partition("=")[0]
    if name in OWN_OPTIONS:
        raise UserError(f"--sbatch {directive}: write --{name} without --sbatch; the script depends on it.")
    # sbatch takes the beginning of an option's name for it, where no other begins so.
    if len(name) > 1 and "array".startswith(name):
        raise UserError(
            f"--sbatch {directive}: all tasks of an array would write the same run folder. Write a script for each "
            "run, with its own output_dir: prefopt launch slurm RECIPE method.beta=0.1 output_dir=runs/beta-0.1 "
            "--output beta-0.1.sbatch."
        )
    if name in FIXED:
        raise UserError(
            f"--sbatch {directive}: the script itself sets {name}, for one task on each node that is told before the "
            "time limit; leave it out."
        )
