"""How an evaluation looks on a terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt_cli.cli.tables import Column, print_hanging, print_line, print_table, text

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.evaluation.evaluate import Evaluation
    from prefopt_cli.evaluation.figures import SetFigures
    from prefopt_cli.evaluation.findings import Finding

SCORES = {
    "reward": "reward",
    "log_ratio": "log-ratio",
    "logp": "log-prob",
    "logp_per_token": "log-prob per token",
}

PERCENT = "percent"

ROWS = (
    ("accuracy, %", None, None),
    *((f" by {title}", f"accuracy/{name}", PERCENT) for name, title in SCORES.items()),
    (" length alone", "baseline/length_only", PERCENT),
    (" majority", "baseline/majority", PERCENT),
    ("margin", None, None),
    (" reward", "margin/reward", ""),
    (" log-prob, nats", "margin/logp", ""),
    ("since the reference", None, None),
    (" accuracy by log-prob, points", "gain/accuracy/logp", PERCENT),
    (" chosen, nats", "change/chosen", ""),
    (" rejected, nats", "change/rejected", ""),
    (" flipped to chosen, %", "flipped/to_chosen", PERCENT),
    (" flipped to rejected, %", "flipped/to_rejected", PERCENT),
)
"""Title, figure, unit; without a figure, a heading."""

MARKS = {"warning": "! ", "note": "- ", "good": "+ "}


def print_evaluation(evaluation: "Evaluation", folder: Path, console: "Console") -> None:
    """The figures of every set side by side, the findings, and where the files are."""
    _print_what(evaluation, console)
    print_line(console)
    titles, columns = _table(evaluation)
    print_table(console, Column("", titles), columns)
    print_line(console)
    print_findings(evaluation.findings, list(evaluation.sets), console)
    for note in dict.fromkeys(note for each in evaluation.sets.values() for note in each.notes):
        print_line(console, note)
    print_line(console, "In brackets: 95 % intervals, prompts resampled.")
    print_line(console, f"Files: {folder} (report.html opens in a browser)")


def print_findings(findings: "tuple[Finding, ...]", sets: list[str], console: "Console") -> None:
    """One paragraph each, named after its set where there are several."""
    for finding in findings:
        where = f"{finding.set}: " if len(sets) > 1 else ""
        print_hanging(console, MARKS[finding.weight], where + finding.text)
    if findings:
        print_line(console)


def _print_what(evaluation: "Evaluation", console: "Console") -> None:
    target = evaluation.target
    print_line(console, f"policy:    {target.source.describe()}")
    if target.reference is not None:
        print_line(console, f"reference: {target.reference.describe()}")
    if target.reward is not None:
        name, scale = target.reward.scale_name, target.reward.scale
        print_line(console, f"reward:    {target.reward.formula}, {name} = {scale:g}")
    else:
        print_line(console, "reward:    none without a reference; --reference RUN_OR_MODEL names one")


def _table(evaluation: "Evaluation") -> tuple[list[str], list[Column]]:
    """Titles of the rows, and a column for every set. Headings of nothing are left out."""
    rows: list[tuple[str, list[str]]] = []
    sets = list(evaluation.sets.values())
    for title, figure, unit in ROWS:
        if figure is None:
            if rows and not any(rows[-1][1]):
                rows.pop()
            rows.append((title, ["" for _ in sets]))
        elif any(figure in each.figures for each in sets):
            rows.append((title, [_cell(each, figure, unit == PERCENT) for each in sets]))
    if not any(rows[-1][1]):
        rows.pop()
    if any(each.calibration for each in sets):
        rows += _calibration(sets)
    if any(each.ranking for each in sets):
        rows += _ranking(sets)
    titles = [title for title, _ in rows]
    columns = [
        Column(
            f"{name}\n{each.pairs:,} pair{'' if each.pairs == 1 else 's'}",
            [cells[number] for _, cells in rows],
        )
        for number, (name, each) in enumerate(evaluation.sets.items())
    ]
    return titles, columns


def _calibration(sets: "list[SetFigures]") -> list[tuple[str, list[str]]]:
    found = [each.calibration for each in sets]
    return [
        ("calibration of sigma(margin)", ["" for _ in found]),
        (" ECE, %", [text(each.ece, percent=True) if each else "" for each in found]),
        (" log loss, nats", [text(each.log_loss) if each else "" for each in found]),
        (" Brier score", [text(each.brier) if each else "" for each in found]),
    ]


def _ranking(sets: "list[SetFigures]") -> list[tuple[str, list[str]]]:
    lists = [each.ranking for each in sets]
    rows = [("whole lists", [f"{each.rows:,} rows" if each else "" for each in lists])]
    for name, title in SCORES.items():
        if any(each and name in each.kendall_tau for each in lists):
            taus = [each.kendall_tau.get(name) if each else None for each in lists]
            rows.append((f" Kendall's tau by {title}", [text(tau) if tau else "" for tau in taus]))
    for name, title in SCORES.items():
        if any(each and name in each.best_of_n for each in lists):
            hits = [each.best_of_n.get(name) if each else None for each in lists]
            rows.append(
                (f" best of n by {title}, %", [text(hit, percent=True) if hit else "" for hit in hits])
            )
    rows.append((" best of n by chance, %", [f"{100 * each.chance:.1f}" if each else "" for each in lists]))
    return rows


def _cell(figures: "SetFigures", name: str, percent: bool) -> str:
    if name not in figures.figures:
        return ""
    signed = name.startswith(("gain/", "change/"))
    shown = text(figures.figures[name], percent=percent, signed=signed)
    if name == "baseline/length_only":
        return f"({'longer' if figures.longer else 'shorter'}) {shown}"
    return shown
