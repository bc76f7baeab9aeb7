"""Heat maps with their figures written into the cells, as PNG."""

import io
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prefopt_cli.evaluation.statistics import Estimate

COLOURS = "RdBu"
"""Below the centre red, above it blue: told apart by colour-blind readers, too."""

DPI = 150
CELL = (1.35, 0.62)
"""Inches."""
WIDE = 4
"""Columns; wider panels stand one below the other."""
LONGEST = 40
"""Characters of a name; longer ones lose their middle, which would take the room of the cells."""


class Panel(NamedTuple):
    """One map: a title, and for every row the estimate of each column."""

    title: str
    cells: Sequence[Sequence[Estimate]]


def heat_map(
    panels: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    centres: Sequence[float],
    marked: Collection[tuple[int, int]] = (),
) -> bytes:
    """A PNG with the panels side by side, or one below the other where they are wide.

    Args:
        panels: the maps.
        rows: their names, the first one on top.
        columns: their names.
        centres: for each panel the value that is neither good nor bad.
        marked: (row, column) of the cells to be framed.
    """
    rows, columns = ([_shortened(name) for name in names] for names in (rows, columns))
    down, across = (len(panels), 1) if len(columns) > WIDE else (1, len(panels))
    width = CELL[0] * len(columns) + 0.09 * max(map(len, rows)) + 1.3
    height = CELL[1] * len(rows) + 0.03 * max(map(len, columns)) + 1.3
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(down, across, squeeze=False).flatten()
    for axes, panel, centre in zip(all_axes, panels, centres, strict=True):
        _draw(figure, axes, panel, centre)
        # Names are no formulas, whatever signs they hold.
        slanted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(columns)), columns, parse_math=False, **slanted)
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.set_xlabel("held-out set")
        axes.set_ylabel("after stage")
        for row, column in marked:
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=2.5, clip_on=False)
            )
    framed = "framed: the dimension that the stage trained; " if marked else ""
    figure.supxlabel(f"{framed}in brackets: 95 % interval", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    return drawn.getvalue()


def _draw(figure: Figure, axes: Axes, panel: Panel, centre: float) -> None:
    values = np.array([[cell.value for cell in row] for row in panel.cells])
    reach = float(np.abs(values - centre).max()) or 1.0
    norm = TwoSlopeNorm(centre, centre - reach, centre + reach)
    image = axes.imshow(values, cmap=COLOURS, norm=norm, aspect="auto")
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_title(panel.title)
    for row, cells in enumerate(panel.cells):
        for column, cell in enumerate(cells):
            dark = abs(cell.value - centre) > 0.65 * reach
            axes.text(
                column,
                row,
                _text(cell),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )


def _shortened(name: str) -> str:
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _text(estimate: Estimate) -> str:
    """The value and, where there is one, its interval below."""
    largest = max(map(abs, estimate))
    digits = 1 if largest >= 10 else 4 if 0 < largest < 0.1 else 2
    value, low, high = (f"{round(part, digits) + 0.0:.{digits}f}" for part in estimate)
    return value if estimate.low == estimate.high else f"{value}\n[{low}, {high}]"
