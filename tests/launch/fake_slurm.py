"""Slurm's programs as far as batch scripts use them: `srun` really starts the tasks, here and side by side.

`write(folder)` puts `srun`, `scontrol` and `scancel` there, to be found before others in PATH. What they were asked
is in `calls`, a line each; tasks of `srun` get the variables that Slurm sets.
"""

import stat
import sys
from pathlib import Path

SRUN = """\
import os, signal, subprocess, sys
arguments = sys.argv[1:]
while arguments and arguments[0].startswith("--"):
    arguments.pop(0)
nodes, tasks = int(os.environ["SLURM_NNODES"]), []
for node in range(nodes):
    own = {
        "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0",
        "SLURM_NTASKS": str(nodes), "SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"], "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})",
    }
    tasks.append(subprocess.Popen(arguments, env={**os.environ, **own}, start_new_session=True))
open(os.path.join(HERE, "tasks"), "w").write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """\
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
"""

SCANCEL = """\
import os, signal
for task in open(os.path.join(HERE, "tasks")).read().split():
    os.kill(int(task), signal.SIGTERM)
"""

RECORD = """\
with open(os.path.join(HERE, "calls"), "a") as calls:
    calls.write(" ".join([NAME, *sys.argv[1:]]) + "\\n")
"""


def write_program(path: Path, code: str) -> None:
    """A Python program that can be run by its name."""
    path.write_text(
        f"#!{sys.executable}\nimport os, sys\nHERE = {str(path.parent)!r}\nNAME = {path.name!r}\n{code}"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def write(folder: Path) -> None:
    """The three programs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        write_program(folder / name, RECORD + code)


def calls(folder: Path) -> list[str]:
    """What the programs were asked, in order."""
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def variables(nodes: int, job: int = 4711) -> dict[str, str]:
    """What Slurm sets for the batch script itself."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1"] * nodes),
    }
