"""A batch script for Slurm, from a recipe.

Each node has one task, which starts the node's processes as `prefopt train` does anywhere. Some minutes before the
time limit, Slurm tells the script (`--signal=B:USR1`), the script tells the tasks (SIGTERM), they save and stop, and
the job goes back into the queue; when it starts again, it goes on with `--resume`.

Slurm does not tell the tasks itself, because the script has to know of it: a job that a person cancels gets SIGTERM
too, and must not come back.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.launch.batch_script import alone, job_name, require_one_line, run_manifest, words
from prefopt_cli.launch.slurm_step import FIRST_PORT, PORTS
from prefopt_cli.recipe.schema import Recipe

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
GPUS = re.compile(r"(?:[A-Za-z0-9._-]+:)?(\d+)")
MEMORY = re.compile(r"\d+(?:\.\d+)?[KMGT]?", re.IGNORECASE)
DIRECTIVE = re.compile(r"[a-z][a-z-]*(?:=.+)?")
LONGEST_WARNING = 300
"""Seconds before the time limit at which the run is told to save and stop; less where the limit is short."""
LATE = 60
"""Slurm may send a signal so many seconds too early, and looks at time limits about as seldom."""


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
    cpus_per_task: int | None = None
    container: str | None = None
    """Image for pyxis/enroot, in which prefopt is installed."""
    directives: Sequence[str] = ()
    """Further options of sbatch, without their dashes: qos=high."""
    setup: Sequence[str] = ()
    """Lines of shell before the run: module load cuda."""


def slurm_script(recipe_path: str, overrides: Sequence[str], recipe: Recipe, options: SlurmOptions) -> str:
    """The script's text.

    Args:
        recipe_path: as on a command line in the present folder, in which the job will run.
        overrides: of the recipe.
        recipe: what they make together.
        options: what to ask Slurm for.

    Raises:
        UserError: an option is nothing that Slurm understands.
    """
    _check(options)
    parts = [
        _head(recipe_path, options),
        _preparation(options),
        _train_command(recipe_path, overrides, recipe, options),
        _stopping(),
        _start(recipe, options),
        END,
    ]
    return "\n".join(parts)


def _head(recipe_path: str, options: SlurmOptions) -> str:
    seconds = time_limit(options.time) if options.time is not None else None
    warning = LONGEST_WARNING if seconds is None else min(LONGEST_WARNING, seconds // 4)
    asked = {
        "job-name": job_name(recipe_path),
        "nodes": str(options.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": options.gpus_per_node if gpu_count(options) else None,
        "cpus-per-task": str(options.cpus_per_task) if options.cpus_per_task else None,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{warning}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH --{directive}" for directive in options.directives)]
    return "\n".join(["#!/bin/bash", f"# prefopt train {recipe_path.splitlines()[0]} on Slurm", *lines, ""])


def _preparation(options: SlurmOptions) -> str:
    lines = ["set -euo pipefail", f"cd -- {shlex.quote(str(Path.cwd()))}"]
    if options.container is None:
        programs = shlex.quote(str(Path(sys.executable).parent))
        lines.append(f"export PATH={programs}:$PATH")
    if options.setup:  # which is often not written for unset variables to be errors
        lines += ["set +u", *options.setup, "set -u"]
    return "\n".join([*lines, ""])


def _train_command(recipe_path: str, overrides: Sequence[str], recipe: Recipe, options: SlurmOptions) -> str:
    """What each node runs, as an array of the shell's; the node's own rank comes last, when it is known."""
    processes = gpu_count(options) or recipe.launch.processes
    own = [*alone(recipe, options.nodes), f"launch.processes={processes}"]
    lines = [f"command=(prefopt train {words([recipe_path, *overrides, *own])})"]
    if options.nodes > 1:
        lines += [
            "",
            "# Machine 0 is the first node; a pair of ports of this job's own.",
            'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            f"port=$(({FIRST_PORT} + SLURM_JOB_ID * 2 % {PORTS}))",
            'command+=("launch.machines=$SLURM_NNODES" "launch.rendezvous=${hosts[0]}:$port")',
        ]
    lines += [
        "",
        "# A run that has begun is gone on with: after a requeue, or when this script is submitted again.",
        f"manifest={run_manifest(recipe)}",
        'if [[ -e "$manifest" ]]; then command+=(--resume); fi',
        "",
    ]
    return "\n".join(lines)


def _stopping() -> str:
    return """\
# Before the time limit the tasks save and stop; Slurm's signal comes to this shell alone.
requeue=no
stop() {
    echo "The time limit is near: the run saves and stops." >&2
    requeue=yes
    signalled=yes
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop USR1
# A job that is cancelled or preempted: the tasks have the signal too, and this shell waits for them.
trap 'signalled=yes' TERM
"""


def _start(recipe: Recipe, options: SlurmOptions) -> str:
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--wait={recipe.launch.timeout + LATE}"]
    if options.cpus_per_task:  # which srun does not take over from the job by itself
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    if options.container is not None:
        here = str(Path.cwd())
        srun += [
            f"--container-image={options.container}",
            f"--container-mounts={here}:{here}",
            f"--container-workdir={here}",
        ]
    if options.nodes > 1:
        started = (
            words([*srun, "--label"])
            + ' bash -c \'exec "$@" "launch.machine_rank=$SLURM_NODEID"\' node "${command[@]}"'
        )
    else:
        started = words(srun) + ' "${command[@]}"'
    return STARTED.format(step=started)


STARTED = """\
{step} &
step=$!
# A signal to this shell ends `wait`, not the step.
while :; do
    signalled=no
    status=0
    wait "$step" || status=$?
    if [[ "$signalled" == no ]]; then break; fi
done
"""

END = """\
if [[ "$status" -ne 0 && "$requeue" == yes ]]; then
    if [[ -e "$manifest" ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "The run had not begun within the time limit; it is not started again." >&2
    fi
fi
exit "$status"
"""


def gpu_count(options: SlurmOptions) -> int:
    """GPUs of each node."""
    found = GPUS.fullmatch(options.gpus_per_node or "0")
    return int(found[1]) if found else 0


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


def _check(options: SlurmOptions) -> None:
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
        require_one_line("--sbatch", directive)
        if not DIRECTIVE.fullmatch(directive):
            raise UserError(
                f"--sbatch: expected an option of sbatch without its dashes, as in qos=high, found {directive!r}."
            )
