"""torch, its driver, the GPUs, and bfloat16; each GPU is made to multiply."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from prefopt_cli.launch.doctor.driver import cuda_of_driver, driver_version
from prefopt_cli.launch.doctor.finding import Finding, gibibytes, in_brief, note, ok, problem

CUDA_BUILD = "pip uninstall --yes torch && pip install torch (the build for CUDA, on Linux)"
BUSY = 0.75
"""A GPU with less of its memory free than this share is used by others than this examination's own processes."""


def devices() -> Iterator[Finding]:
    """Build, driver, every GPU, bfloat16."""
    build = _build()
    yield ok(f"torch {torch.__version__} is built for {build}")
    if not torch.cuda.is_available():
        yield _why_no_gpu(build)
        yield _bfloat16_on_cpu()
        return
    if driver := driver_version():
        cuda = cuda_of_driver()
        yield ok(f"NVIDIA driver {driver}" + (f", for CUDA up to {cuda[0]}.{cuda[1]}" if cuda else ""))
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)
    yield _bfloat16()


def _build() -> str:
    version = torch.version
    if version.cuda:
        return f"CUDA {version.cuda}"
    return f"ROCm {version.hip}" if version.hip else "the CPU"


def _why_no_gpu(build: str) -> Finding:
    """No GPU can be used: is there none, is it hidden, does torch not fit?"""
    cuda, hidden = cuda_of_driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.backends.mps.is_available():
        return ok("Apple's GPU (MPS) can be used")
    if hidden is not None and hidden.strip() in ("", "-1") and (cuda or driver_version()):
        return note("CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES", feature="gpu")
    if cuda and build == "the CPU":
        return note(
            f"there is an NVIDIA driver (for CUDA {cuda[0]}.{cuda[1]}), and torch cannot use it",
            CUDA_BUILD,
            feature="gpu",
        )
    wanted = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if cuda and wanted[0] > cuda[0]:
        return note(
            f"torch wants CUDA {torch.version.cuda}, and the driver ends at {cuda[0]}.{cuda[1]}",
            f"update the driver, or install a torch that is built for CUDA {cuda[0]}: see pytorch.org/get-started",
            feature="gpu",
        )
    if cuda:
        return note("there is an NVIDIA driver, and torch finds no GPU", "see what `nvidia-smi` says", "gpu")
    return note(
        "no GPU: training takes place on the CPU, which is for small models",
        "on a cluster: prefopt launch slurm RECIPE; in a cloud: prefopt launch skypilot RECIPE",
        feature="gpu",
    )


def _gpu(number: int) -> Finding:
    name = f"cuda:{number}"
    try:
        facts: Any = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = (
            f"{name} {facts.name}, {gibibytes(total)} ({gibibytes(free)} free), "
            f"compute capability {facts.major}.{facts.minor}"
        )
        ones = torch.ones(64, 64, device=name)
        if (ones @ ones).sum().item() != 64.0**3:
            return problem(
                f"{text}: it multiplies wrongly", "leave it out with CUDA_VISIBLE_DEVICES; reboot", "gpu"
            )
    except Exception as error:  # whatever the driver has to say
        return problem(
            f"{name} cannot be used: {in_brief(error)}",
            "see what `nvidia-smi` says; leave it out with CUDA_VISIBLE_DEVICES",
            feature="gpu",
        )
    if free < BUSY * total:
        return note(
            f"{text}: another program uses it",
            "end it (`nvidia-smi` names it), or take less: smaller batches",
        )
    return ok(text, feature="gpu")


def _bfloat16() -> Finding:
    without = [
        number
        for number in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(number) < (8, 0) and not torch.version.hip
    ]
    if without:
        return note(
            f"bfloat16 is not in the hardware of cuda:{', cuda:'.join(map(str, without))}",
            "write training.bf16: false (and fp16: true)",
            feature="bf16",
        )
    ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    right = (ones @ ones)[0, 0].item() == 64.0
    return (
        ok("bfloat16 works", "bf16")
        if right
        else note("bfloat16 multiplies wrongly", "write training.bf16: false", "bf16")
    )


def _bfloat16_on_cpu() -> Finding:
    ones = torch.ones(8, 8, dtype=torch.bfloat16)
    works = (ones @ ones)[0, 0].item() == 8.0
    text = "bfloat16 on the CPU" + (
        " works; it is slower than float32 without AMX or AVX-512" if works else ""
    )
    return ok(text) if works else note(f"{text} multiplies wrongly", "write training.bf16: false", "bf16")
