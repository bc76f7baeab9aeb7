"""What this machine computes on, found out without loading torch where that is possible."""

import os
import subprocess
import sys
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.launch.variables import FOLDER

NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg", "/dev/davinci_manager", "/dev/habanalabs")
"""Files that a Linux machine has whose drivers serve an accelerator."""

COUNT = """\
import torch
print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)
"""
"""In a process of its own: loading torch here would keep its memory for as long as the run takes."""


def may_have_accelerator() -> bool:
    """False where there is certainly none; true costs nothing but means little."""
    return sys.platform != "linux" or any(Path(node).exists() for node in NODES)


def count_accelerators() -> int:
    """How many accelerators torch sees, as ``CUDA_VISIBLE_DEVICES`` and the like leave them."""
    if not may_have_accelerator():
        return 0
    asked = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=False)
    last = asked.stdout.strip().rpartition("\n")[2]
    return int(last) if last.isdigit() else 0


def require_accelerators(*, use_cpu: bool) -> None:
    """Refuse, in a process that the launcher started, to share an accelerator with another one.

    Raises:
        UserError: there are fewer than processes on this machine.
    """
    on_cpu = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    if FOLDER not in os.environ or on_cpu:
        return
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if 0 < count < processes:
        raise UserError(
            f"launch.processes: {processes} processes need a GPU each, and there are {count} here. Write "
            "launch.processes=auto, or training.use_cpu=true."
        )


def count_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
