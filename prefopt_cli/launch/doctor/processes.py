"""Whether several processes can work together: two are started by torchrun, and add a number up."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from prefopt_cli.launch.doctor.finding import Finding, in_brief, note, ok
from prefopt_cli.launch.leaving import leave

PATIENCE = 40
"""Seconds for two processes to start and meet."""
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher around this command has set, and what the two must not take for their own."""
BACKENDS = {"gloo": "cpu", "nccl": "cuda"}
"""What carries numbers between processes, by where these are; NCCL is tried where there are two GPUs."""
MET = "met through {backend}"
FIREWALL = "check that this machine reaches itself: ping -c 1 localhost; ping -c 1 $(hostname)"


def processes(quick: bool = False) -> Iterator[Finding]:
    """What starts processes is there, and two of them really work together.

    Args:
        quick: start none.
    """
    trial = None if quick else _start_two()
    try:
        yield from _launchers()
        if trial is not None:
            yield from _judge(trial)
    finally:
        if trial is not None:
            trial.kill()
            trial.wait()


def _launchers() -> Iterator[Finding]:
    try:
        import torch.distributed.run

        yield ok("torchrun is there", feature="processes")
    except ImportError as error:
        yield note(f"torchrun fails: {in_brief(error)}", "pip install --force-reinstall torch", "processes")
        return
    try:
        import accelerate

        yield ok(f"accelerate {accelerate.__version__} is there")
    except Exception as error:
        yield note(
            f"accelerate fails: {in_brief(error)}", 'pip install --upgrade "accelerate>=1.10"', "processes"
        )
    yield from _deepspeed()
    import torch

    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        yield note("torch is built without gloo", "pip install --force-reinstall torch", "processes")
    if torch.cuda.is_available() and not distributed.is_nccl_available():
        yield note("torch is built without NCCL", "pip install --force-reinstall torch", "processes")


def _deepspeed() -> Iterator[Finding]:
    """Installed is not enough: at its import it looks for compilers and GPUs."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return
    try:
        import deepspeed  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except Exception as error:
        yield note(
            f"deepspeed {version} cannot be imported: {in_brief(error)}",
            "pip install --upgrade --force-reinstall --no-deps deepspeed",
            feature="deepspeed",
        )


def _start_two() -> "subprocess.Popen[str]":
    """As `prefopt train` starts its own; they add up a number."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in OURS and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "prefopt_cli.launch.doctor.processes"]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _judge(trial: "subprocess.Popen[str]") -> Iterator[Finding]:
    try:
        out, err = trial.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        trial.terminate()  # torchrun ends the two
        yield note(f"two processes did not meet within {PATIENCE} s", FIREWALL, "processes")
        return
    for backend in BACKENDS:
        if MET.format(backend=backend) in out:
            yield ok(f"two processes meet and add up ({backend})", feature="processes")
    if trial.returncode:
        lines = [line for line in err.splitlines() if "Error" in line]
        said = lines[0].strip() if lines else f"exit code {trial.returncode}"
        yield note(f"two processes cannot work together: {said[:200]}", FIREWALL, "processes")


def meet() -> None:
    """What each of the two does."""
    from datetime import timedelta

    import torch
    from torch import distributed

    signal.alarm(PATIENCE)  # a process that hangs must not outlive the examination
    rank = int(os.environ["RANK"])
    on_gpus = torch.cuda.device_count() >= 2
    if on_gpus:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(seconds=PATIENCE / 2)
    )
    for backend, device in BACKENDS.items():
        if device == "cuda" and not on_gpus:
            continue
        number = torch.tensor([rank + 1.0], device=device)
        distributed.all_reduce(number)
        if number.item() != 3.0:
            raise ArithmeticError(f"{backend} added 1 and 2 up to {number.item()}")
        if rank == 0:
            print(MET.format(backend=backend), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    meet()
    leave(0)
