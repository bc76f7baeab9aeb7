"""Cores, memory and limits of this machine, or of the share of it that a container or job has."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from prefopt_cli.launch.doctor.finding import Finding, gibibytes, note, ok

LITTLE_MEMORY = 4 * 2**30
LITTLE_SHARED_MEMORY = 2**30
FEW_FILES = 1024
CGROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


def machine() -> Iterator[Finding]:
    """Cores, memory, shared memory, open files."""
    yield _cores()
    yield _memory()
    yield _shared_memory(Path("/dev/shm"))
    yield _open_files()


def _cores() -> Finding:
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    limit = core_limit()
    share = min(usable, limit or usable)
    if share < there:
        why = "the cgroup's limit" if limit and limit < usable else "the processor affinity"
        return ok(f"{share:g} of {there} cores ({why})")
    return ok(f"{there} {'core' if there == 1 else 'cores'}")


def _memory() -> Finding:
    memory, limit = psutil.virtual_memory(), memory_limit()
    total, available, whose = memory.total, memory.available, ""
    if limit and limit < total:
        # What else runs in the same cgroup is not known; this is at most what is left.
        total, available, whose = limit, min(available, limit), " (the cgroup's limit)"
    text = f"{gibibytes(total)} of memory{whose}, {gibibytes(available)} available"
    if available < LITTLE_MEMORY:
        return note(text, "end other programs, or ask for more: prefopt launch slurm RECIPE --mem 64G")
    return ok(text)


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return note(f"there is no {folder}", "mount it: mount -t tmpfs tmpfs /dev/shm", feature="processes")
    disk = shutil.disk_usage(folder)
    text = f"{gibibytes(disk.total)} of shared memory in {folder}, {gibibytes(disk.free)} free"
    if disk.free < LITTLE_SHARED_MEMORY:
        return note(
            f"{text}: little for NCCL and data-loading processes",
            "in a container: docker run --shm-size=8g ..., or --ipc=host",
        )
    return ok(text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("no limit of open files")
    if soft < FEW_FILES:
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return note(f"at most {soft} open files", f"ulimit -n {most}")
    return ok(f"at most {soft} open files")


def core_limit(cgroups: Path = CGROUPS, of_process: Path = OF_PROCESS) -> float | None:
    """Cores that the control groups allow, None without a limit."""
    limits = []
    for folder in _groups(cgroups, of_process, "cpu"):
        quota = _words(folder / "cpu.max")
        if len(quota) < 2:
            quota = _words(folder / "cpu.cfs_quota_us")[:1] + _words(folder / "cpu.cfs_period_us")[:1]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
            limits.append(int(quota[0]) / int(quota[1]))
    return min(limits, default=None)


def memory_limit(cgroups: Path = CGROUPS, of_process: Path = OF_PROCESS) -> int | None:
    """Bytes of memory that the control groups allow, None without a limit."""
    limits = []
    for folder in _groups(cgroups, of_process, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdigit():
                limits.append(int(words[0]))
    return min(limits, default=None)


def _groups(cgroups: Path, of_process: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of all around it: the narrowest limit counts (versions 1 and 2)."""
    try:
        lines = of_process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        folder = root / group.strip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root) and each.is_dir())


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
