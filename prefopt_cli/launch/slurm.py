"""A batch script for Slurm, from a recipe or a chain.

Each node has one task, which starts the node's processes as `prefopt train` does anywhere. Some minutes before the
time limit, Slurm tells the script (`--signal=B:USR1`), the script tells the tasks (SIGTERM), they save and stop, and
the job goes back into the queue; when it starts again, it goes on (a recipe's run with `--resume`).

Slurm does not tell the tasks itself, because the script has to know of it: a job that a person cancels gets SIGTERM
too, and must not come back.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from prefopt_cli.launch.batch_script import Work, alone, in_folder, job_name, training, words
from prefopt_cli.launch.slurm_container import caches, container_mounts, output_outside
from prefopt_cli.launch.slurm_options import SlurmOptions, check_options, sbatch_line, time_limit
from prefopt_cli.launch.slurm_step import FIRST_PORT, PORTS
from prefopt_cli.recipe.schema import Recipe

LONGEST_WARNING = 300
"""Seconds before the time limit at which the run is told to save and stop; less where the limit is short."""
LATE = 60
"""Slurm may send a signal so many seconds too early, and looks at time limits about as seldom."""


def slurm_script(recipe_path: str, overrides: Sequence[str], recipe: Recipe, options: SlurmOptions) -> str:
    """The text of a script that trains a recipe.

    Args:
        recipe_path: as on a command line in the present folder, in which the job will run.
        overrides: of the recipe.
        recipe: what they make together.
        options: what to ask Slurm for.

    Raises:
        UserError: as of `script_of`.
    """
    return script_of(training(recipe_path, overrides, recipe), options)


def script_of(work: Work, options: SlurmOptions) -> str:
    """The text of a script that does some work.

    Args:
        work: a recipe's, or a chain's.
        options: what to ask Slurm for; nothing is assumed.

    Raises:
        UserError: an option is nothing that Slurm understands, or the container cannot see what it must.
    """
    check_options(options)
    parts = [
        _head(work, options),
        _preparation(work, options),
        _command(work, options),
        STOPPING,
        _start(work, options),
        END,
    ]
    return "\n".join(parts)


def _head(work: Work, options: SlurmOptions) -> str:
    seconds = time_limit(options.time) if options.time is not None else None
    warning = LONGEST_WARNING if seconds is None else min(LONGEST_WARNING, seconds // 4)
    asked = {
        "job-name": job_name(work.path),
        "nodes": str(options.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": options.gpus_per_node if options.gpus else None,
        "cpus-per-task": str(options.cpus_per_task) if options.cpus_per_task else None,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{warning}",
    }
    lines = [sbatch_line(name, value) for name, value in asked.items() if value is not None]
    lines.append(sbatch_line("requeue", None))
    for directive in options.directives:
        name, _, value = directive.partition("=")
        lines.append(sbatch_line(name, value or None))
    return "\n".join(
        ["#!/bin/bash", f"# prefopt {work.command} {work.path.splitlines()[0]} on Slurm", *lines, ""]
    )


def _preparation(work: Work, options: SlurmOptions) -> str:
    lines = ["set -euo pipefail", f"cd -- {shlex.quote(str(Path.cwd()))}"]
    if options.container is None:
        programs = shlex.quote(str(Path(sys.executable).parent))
        lines.append(f"export PATH={programs}:$PATH")
    else:
        lines += [f"export {name}={shlex.quote(place)}" for name, place in caches().items()]
        above = str(Path(output_outside(work, options.container_mounts)).parent)
        lines.append(f"mkdir -p -- {shlex.quote(above)}  # what is mounted must be there")
    if options.setup:  # which is often not written for unset variables to be errors
        lines += ["set +u", *options.setup, "set -u"]
    return "\n".join([*lines, ""])


def _command(work: Work, options: SlurmOptions) -> str:
    """What each node runs, as an array of the shell's; the node's own rank comes last, when it is known."""
    processes = options.gpus or work.launch.processes
    own = [*alone(work, options.nodes), f"launch.processes={processes}"]
    lines = [f"command=(prefopt {work.command} {words([work.path, *work.overrides, *own])})"]
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
        "# What has begun is gone on with: after a requeue, or when this script is submitted again.",
        f"record={_record(work, options)}",
    ]
    if work.going_on:
        lines.append(f'if [[ -e "$record" ]]; then command+=({words(work.going_on)}); fi')
    lines.append("")
    return "\n".join(lines)


def _record(work: Work, options: SlurmOptions) -> str:
    """The file that says whether there is something to go on with, as a word of the shell's."""
    if options.container is None:
        return in_folder(work.output_dir, work.record)
    return in_folder(output_outside(work, options.container_mounts), work.record)


STOPPING = """\
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


def _start(work: Work, options: SlurmOptions) -> str:
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--wait={work.launch.timeout + LATE}"]
    if options.cpus_per_task:  # which srun does not take over from the job by itself
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    if options.container is not None:
        here = str(Path.cwd())
        srun += [
            f"--container-image={options.container}",
            f"--container-mounts={container_mounts(work, options.container_mounts)}",
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
    if [[ -e "$record" ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "The run had not begun within the time limit; it is not started again." >&2
    fi
fi
exit "$status"
"""
