"""Means over seeds with their intervals, and Markdown tables of them."""

import statistics

from benchmarks.sandbox_runs import Row

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def value(row: Row, name: str) -> float:
    return float(row[name][0])


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    width = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(width)


def shown(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    mean, width = over_seeds([scale * each for each in values])
    return f"{mean:.{digits}f} ± {width:.{digits}f}"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]
