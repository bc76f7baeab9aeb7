"""The tables and the picture of `benchmarks.sandbox_sequential`."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sandbox_runs import Row
from benchmarks.tables import shown, table, value
from prefopt_cli.sandbox.plan import ScoreSettings

ORDER = ("helpful", "polite", "concise")
LAST = ORDER[-1]
Stages = Sequence[dict[str, Any]]


def gain(row: Row, dimension: str) -> float:
    """Gold reward of a policy over that of the base policy."""
    name = f"reward/{dimension}"
    return value(row, name) - float(row["base"][name])


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """The seeds of every policy together, by its stages as a word."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["job"].get("stages", "joint")), []).append(row)
    return found


def of(rows: list[Row], stages: Stages | str) -> list[Row]:
    """The seeds of one policy."""
    return groups(rows)[json.dumps(stages)]


def chain(order: Sequence[str], value: float, beta: float) -> list[dict[str, Any]]:
    """Stages with one lambda throughout."""
    return [
        {"dimension": name, "lambda": value if number else 0.0, "beta": beta}
        for number, name in enumerate(order)
    ]


def report(rows: list[Row], versions: dict[str, str], settings: ScoreSettings, beta: float) -> str:
    """Markdown; `beta` is that of all stages unless it is said otherwise."""
    tables = [row for row in rows if row["job"]["kind"] == "retention"]
    rows = [row for row in rows if row["job"]["kind"] != "retention"]
    seeds, base = len({row["job"]["seed"] for row in rows}), rows[0]["base"]
    rewards = ", ".join(f"{name} {base[f'reward/{name}']:.2f}" for name in ORDER)
    lines = [
        "# Sequential preference optimization in the sandbox",
        "",
        f"{seeds} seeds each, judged on {settings.prompts} held-out prompts with {settings.per_prompt} samples each; "
        "mean ± half a 95 % interval over the seeds (Student's t). Figures are gold rewards of the policy's own "
        f"samples, over those of the base policy's ({rewards}); the KL to it is in nats. Polite and concise pull "
        f"against each other. Every stage is one epoch of its dimension's pairs, 64 a step, with beta {beta:g}; the "
        "joint run is one epoch of all three. Made by `python -m benchmarks.sandbox_sequential`.",
        "",
        "## After every stage",
        "",
        *_chains(rows, beta),
        "With lambda minus without it, of the same seed, at the end of the chain:",
        "",
        *_with_minus_without(rows, beta),
        "## Held-out preferences",
        "",
        "`prefopt retention` at the end of the same chains: the share of held-out pairs that the policy ranks as "
        "preferred by its log-ratio to the base, in %, and its change in points since the stage that trained the "
        "dimension.",
        "",
        *_held_out(tables),
        "## The last stage alone",
        "",
        "From the policy of the naive second stage: what concise gains and what the others lose in the third, for "
        "lambda (of helpful and of polite) and beta.",
        "",
        *_last_stage(rows, beta),
        "## At the same gain",
        "",
        "What is left of the earlier dimensions, with lambda minus without it at the same concise reward, of the same "
        "seed; naive training is read linearly between its betas. `none`: some seed is outside of what these reach.",
        "",
        *_at_same_gain(rows, beta),
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
    ]
    return "\n".join(lines)


def _figures(own: list[Row]) -> list[str]:
    return [
        *(shown([gain(row, name) for row in own]) for name in ORDER),
        shown([value(row, "kl") for row in own], 1),
        shown([value(row, "entropy") for row in own], 1),
    ]


def _chains(rows: list[Row], beta: float) -> list[str]:
    lines = []
    for order in (ORDER, ORDER[::-1]):
        used = {each["job"]["stages"][1]["lambda"] for each in rows if _is_chain(each, order, beta)}
        for number in sorted(used):
            name = ("naive" if number == 0 else f"lambda {number:g}") + (
                "" if order == ORDER else ", reversed"
            )
            stages = chain(order, number, beta)
            for length in range(1, len(order) + 1):
                if length > 1 or number == 0:  # the first stage is the same in all
                    after = " → ".join(order[:length])
                    lines.append([name if length > 1 else "", after, *_figures(of(rows, stages[:length]))])
    lines.append(["joint", "mixed", *_figures(of(rows, "joint"))])
    return table(["", "after", *ORDER, "KL", "entropy"], lines)


def _with_minus_without(rows: list[Row], beta: float) -> list[str]:
    lines = []
    for order in (ORDER, ORDER[::-1]):
        naive = {row["job"]["seed"]: row for row in of(rows, chain(order, 0.0, beta))}
        for number in sorted(
            {row["job"]["stages"][1]["lambda"] for row in rows if _is_chain(row, order, beta)}
        ):
            if number:
                own = of(rows, chain(order, number, beta))
                cells = [
                    shown([gain(row, name) - gain(naive[row["job"]["seed"]], name) for row in own])
                    for name in ORDER
                ]
                lines.append([" → ".join(order), f"{number:g}", *cells])
    return table(["", "lambda", *ORDER], lines)


def _held_out(tables: list[Row]) -> list[str]:
    lines = []
    for own in groups(tables).values():
        stages = own[0]["job"]["stages"]
        cells = []
        for name in ORDER:
            accuracy = shown([row["accuracy"][name][0] for row in own], 1, 100)
            changes = [row["change"][name][0] for row in own if name in row["change"]]
            cells += [accuracy, shown(changes, 1, 100) if changes else "trained last"]
        order = " → ".join(stage["dimension"] for stage in stages)
        lines.append([order, f"{stages[1]['lambda']:g}", *cells])
    head = [text for name in ORDER for text in (name, f"change of {name}")]
    first = " → ".join(ORDER)
    return table(["", "lambda", *head], sorted(lines, key=lambda line: (line[0] != first, float(line[1]))))


def _is_chain(row: Row, order: Sequence[str], beta: float) -> bool:
    stages = row["job"].get("stages", [])
    return len(stages) == len(order) and stages == chain(order, stages[1]["lambda"], beta)


def last_stages(rows: list[Row], beta: float) -> dict[tuple[float, float], list[Row]]:
    """(lambda, beta) of the last stage -> seeds, of those from the naive second stage."""
    before = chain(ORDER[:-1], 0.0, beta)
    found: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        stages = row["job"].get("stages", [])
        if len(stages) == len(ORDER) and stages[:-1] == before:
            found.setdefault((stages[-1]["lambda"], stages[-1]["beta"]), []).append(row)
    return dict(sorted(found.items()))


def _last_stage(rows: list[Row], beta: float) -> list[str]:
    start = {row["job"]["seed"]: row for row in of(rows, chain(ORDER[:-1], 0.0, beta))}

    def change(own: list[Row], of_row: Callable[[Row], float]) -> str:
        return shown([of_row(row) - of_row(start[row["job"]["seed"]]) for row in own])

    lines = [
        [
            f"{number:g}",
            f"{last_beta:g}",
            *(change(own, lambda row, name=name: gain(row, name)) for name in (LAST, *ORDER[:-1])),  # type: ignore[misc]
            shown([value(row, "kl") for row in own], 1),
        ]
        for (number, last_beta), own in last_stages(rows, beta).items()
    ]
    return table(["lambda", "beta", LAST, *ORDER[:-1], "KL to base"], lines)


def at_same(rows: list[Row], own: Row, name: str, beta: float) -> float | None:
    """The naive last stage's gain in a dimension where its gain in the last one is that of `own`, of the same seed."""
    places = [
        (gain(row, LAST), gain(row, name))
        for (number, _), found in last_stages(rows, beta).items()
        if number == 0
        for row in found
        if row["job"]["seed"] == own["job"]["seed"]
    ]
    xs, ys = np.array(sorted(places)).T
    wanted = gain(own, LAST)
    return float(np.interp(wanted, xs, ys)) if xs[0] <= wanted <= xs[-1] else None


def _at_same_gain(rows: list[Row], beta: float) -> list[str]:
    compared = {
        f"last stage, lambda {number:g}, beta {last_beta:g}": own
        for (number, last_beta), own in last_stages(rows, beta).items()
        if number
    }
    for number in sorted({row["job"]["stages"][1]["lambda"] for row in rows if _is_chain(row, ORDER, beta)}):
        if number:
            compared[f"all stages, lambda {number:g}, beta {beta:g}"] = of(rows, chain(ORDER, number, beta))
    compared["joint"] = of(rows, "joint")
    lines = []
    for label, own in compared.items():
        cells = []
        for name in ORDER[:-1]:
            naive = [at_same(rows, row, name, beta) for row in own]
            found = [gain(row, name) - each for row, each in zip(own, naive, strict=True) if each is not None]
            cells.append(shown(found) if len(found) == len(own) else "none")
        lines.append([label, shown([gain(row, LAST) for row in own]), *cells])
    return table(["", f"{LAST}, over the base", *(f"{name}, minus naive" for name in ORDER[:-1])], lines)


def draw(rows: list[Row], path: Path, beta: float) -> None:
    """Means over the seeds: what is left of polite and of helpful, by what concise gained."""
    rows = [row for row in rows if row["job"]["kind"] != "retention"]
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "prefopt"  # the same figures, the same file
    figure = Figure(figsize=(8.4, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, kept in zip(panels, ("polite", "helpful"), strict=True):
        _panel(axes, rows, kept, beta)
    panels[0].legend(fontsize=7)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Any, rows: list[Row], kept: str, beta: float) -> None:
    def place(own: list[Row]) -> tuple[float, float]:
        return (
            statistics.fmean(gain(row, LAST) for row in own),
            statistics.fmean(gain(row, kept) for row in own),
        )

    def label(at: tuple[float, float], text: str) -> None:
        axes.annotate(text, at, textcoords="offset points", xytext=(5, 4), fontsize=7)

    stages = last_stages(rows, beta)
    for number in sorted({number for number, _ in stages}):
        places = {each: place(own) for (at, each), own in stages.items() if at == number}
        name = "naive" if number == 0 else f"lambda {number:g}"
        axes.plot(
            *zip(*places.values(), strict=True), "-o", markersize=4, label=f"last stage: {name}, by beta"
        )
        for each, at in places.items():
            label(at, f"{each:g}")
    whole = sorted({row["job"]["stages"][1]["lambda"] for row in rows if _is_chain(row, ORDER, beta)} - {0.0})
    places = {number: place(of(rows, chain(ORDER, number, beta))) for number in whole}
    axes.plot(*zip(*places.values(), strict=True), ":s", markersize=4, label="all stages, by lambda")
    for number, at in places.items():
        label(at, f"{number:g}")
    for marker, name, own in (
        ("*", "joint", of(rows, "joint")),
        ("D", "before the last stage", of(rows, chain(ORDER[:-1], 0.0, beta))),
    ):
        axes.plot(*place(own), marker, color="black", markersize=6, linestyle="none", label=name)
    axes.set_xlabel("concise: gold reward over the base policy")
    axes.set_ylabel(f"{kept}: gold reward over the base policy")
    axes.grid(alpha=0.2)
