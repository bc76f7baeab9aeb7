"""How much disk a run's checkpoints will take, from the headers of the starting policy's weights."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from prefopt_cli.recipe.schema import LoraAdapter, Recipe

LONGEST_HEADER = 100 * 2**20
BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
"""Of trained weights, by `model.dtype`; auto trains in float32."""
MOMENTS = 2
"""Adam keeps two numbers for every trained weight, of the weight's type. Other optimizers keep less."""
NOT_ADAPTED = ("embed", "lm_head", "wte", "wpe")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a folder's safetensors files, read from their headers alone."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(_of_file(file))
    return found


def _of_file(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length)) if length <= LONGEST_HEADER else {}
    except (OSError, ValueError, struct.error):
        return
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, tuple(entry["shape"])


def checkpoint_bytes(recipe: Recipe, tensors: dict[str, tuple[int, ...]]) -> int:
    """Bytes of one checkpoint, about: what is trained, and the optimizer's two moments of it.

    Args:
        recipe: says what is trained, and in which type.
        tensors: name -> shape of the starting policy's weights.
    """
    if isinstance(recipe.adapter, LoraAdapter):
        # Every linear layer, as by default: fewer are fewer.
        trained = sum(
            recipe.adapter.r * sum(shape)
            for name, shape in tensors.items()
            if len(shape) == 2 and not any(part in name for part in NOT_ADAPTED)
        )
        size = BYTES_OF["float32"]
    else:
        trained = sum(map(math.prod, tensors.values()))
        size = BYTES_OF[recipe.model.dtype]
    return trained * size * (1 + MOMENTS)
