"""Short names of policies, for tables and pictures."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefopt_cli.recipe.schemes import has_scheme


def labels(policies: Sequence[str]) -> dict[str, str]:
    """By name: the last folder of a path where no other policy has the same, else the whole name."""
    short = {name: name if has_scheme(name) else Path(name).expanduser().absolute().name for name in policies}
    counts = Counter(short.values())
    return {name: label if counts[label] == 1 else name for name, label in short.items()}
