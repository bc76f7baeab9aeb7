"""NVIDIA's driver, asked without torch: what it is tells why torch may see no GPU."""

import ctypes
import re
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run, (12, 8); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value <= 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """The driver's own version, 570.86.15; None where it is not loaded."""
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.read_text().partition("\n")[0])
    except OSError:
        return None
    return found[1] if found else None
