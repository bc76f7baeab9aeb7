"""Draws docs/packing-mask.svg from the mask that training uses: python docs/packing_mask.py"""

from pathlib import Path

import torch

from prefopt_cli.scoring.attention import dense_mask
from prefopt_cli.scoring.packing import Example, pack

CELL, LEFT, TOP = 18, 118, 92
COLOURS = {0: "#4c78a8", 1: "#54a24b", 2: "#e45756"}
NAMES = {0: "prompt", 1: "chosen", 2: "rejected"}
EXAMPLES = [Example([0] * 4, ([0] * 3, [0] * 4)), Example([0] * 3, ([0] * 2, [0] * 3))]


def draw() -> str:
    """The picture: a row per query, a column per key, coloured by what the key belongs to."""
    packed = pack(EXAMPLES)
    segments, branches = (torch.from_numpy(array) for array in (packed.segments, packed.branches))
    visible = dense_mask(segments, branches)[0]
    kinds, count = branches[0].tolist(), branches.size(1)
    shapes = [
        f'<rect x="{LEFT + key * CELL}" y="{TOP + query * CELL}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="{COLOURS[kinds[key]] if visible[query, key] else "#eeeeee"}"/>'
        for query in range(count)
        for key in range(count)
    ]
    for start, end in runs(list(zip(segments[0].tolist(), kinds, strict=True))):
        name, middle = NAMES[kinds[start]], (start + end) / 2 * CELL
        text = f"{name} {int(segments[0, start]) + 1}"
        shapes.append(label(LEFT - 8, TOP + middle + 4, text, "end"))
        shapes.append(
            f'<g transform="translate({LEFT + middle + 4},{TOP - 8}) rotate(-60)">{label(0, 0, text, "start")}</g>'
        )
    for token in range(count):
        place = int(packed.position_ids[0, token])
        shapes.append(label(LEFT + count * CELL + 14, TOP + (token + 0.7) * CELL, str(place), "middle"))
    shapes.append(label(LEFT + count * CELL + 26, TOP - 8, "position", "start"))
    shapes.append(label(LEFT - 8, TOP - 8, "query ↓ key →", "end"))
    width, height = LEFT + count * CELL + 84, TOP + count * CELL + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(shapes)}'
        "</svg>\n"
    )


def runs(kinds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches (start, end) of equal neighbours."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return list(zip(starts, [*starts[1:], len(kinds)], strict=True))


def label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("packing-mask.svg").write_text(draw(), encoding="utf-8")
