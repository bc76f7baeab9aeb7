"""How a comparison looks on a terminal."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt_cli.cli.evaluation_report import SCORES, print_findings
from prefopt_cli.cli.tables import Column, print_line, print_table, text

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.evaluation.compare import Comparison, Policy
    from prefopt_cli.evaluation.paired import PairedSet

SIGNIFICANT = "*"


def print_comparison(comparison: "Comparison", sort: str, folder: Path, console: "Console") -> None:
    """A table for every set, the findings, and where the files are."""
    from prefopt_cli.evaluation.compare_findings import comparison_findings

    for each in comparison.skipped:
        print_line(console, f"Left out: {each.name} ({each.reason}).")
    if comparison.skipped:
        print_line(console)
    for name, paired in comparison.sets.items():
        counts = f"pairs: {len(paired.first.chosen):,}, prompts: {paired.prompts:,}"
        print_line(console, f"{name} ({counts}), measured from {comparison.baseline.label}")
        print_line(console)
        _print_set(comparison, paired, sort, console)
        print_line(console)
    print_findings(tuple(comparison_findings(comparison)), list(comparison.sets), console)
    print_line(
        console,
        f"In brackets: 95 % intervals, prompts resampled. {SIGNIFICANT} p < 0.05, prompts permuted, adjusted for all "
        "policies and sets (Holm).",
    )
    sampled = {policy.divergence.prompts for policy in comparison.policies if policy.divergence}
    if sampled and comparison.kl:
        print_line(
            console,
            f"KL: to each policy's reference, over samples of up to {comparison.kl.max_new_tokens} tokens to "
            f"{' or '.join(map(str, sorted(sampled)))} held-out prompts.",
        )
    for policy in comparison.policies:
        for note in policy.trained.notes:
            print_line(console, f"{policy.label}: {note}")
    print_line(console, f"Files: {folder} (report.html opens in a browser)")


def _print_set(comparison: "Comparison", paired: "PairedSet", sort: str, console: "Console") -> None:
    policies = sorted(comparison.policies, key=lambda each: _key(each, paired, sort))
    labels = [each.label for each in policies]
    columns = [
        Column(
            f"accuracy by\n{SCORES[paired.main]}, %",
            [text(paired.figures[each][f"accuracy/{paired.main}"], percent=True) for each in labels],
        ),
        Column(
            "difference,\npoints  ",
            [_difference(paired, each, "accuracy/main", percent=True) for each in labels],
        ),
        Column("p\n(Holm)", [_p(paired, each) for each in labels]),
        *(
            [
                Column(
                    f"accuracy by\n{SCORES['logp']}, %",
                    [text(paired.figures[each]["accuracy/logp"], percent=True) for each in labels],
                )
            ]
            if paired.main != "logp"
            else []
        ),
        Column(
            f"margin by\n{SCORES[paired.margin]}",
            [text(paired.figures[each][f"margin/{paired.margin}"]) for each in labels],
        ),
    ]
    if any(each.kl for each in policies):
        columns.append(Column("KL, nats", [text(each.kl) if each.kl else "" for each in policies]))
    if paired.calibration:
        columns.append(
            Column(
                "ECE, %",
                [
                    text(paired.calibration[each].ece, percent=True) if each in paired.calibration else ""
                    for each in labels
                ],
            )
        )
    columns += [
        Column(f"gold reward\n{dimension}", [_gold(each, dimension) for each in policies])
        for dimension in dict.fromkeys(name for each in policies for name in each.gold or {})
    ]
    columns.append(Column("changed to\nchosen/rejected", [_changed(paired, each) for each in labels]))
    print_table(console, Column("", labels), columns, bold={labels.index(comparison.baseline.label)})


def _key(policy: "Policy", paired: "PairedSet", sort: str) -> tuple[float, str]:
    """Best first; the KL from the lowest on."""
    figures = paired.figures[policy.label]
    if sort == "kl":
        return (policy.kl.value if policy.kl else math.inf, policy.label)
    if sort == "gold":
        return (-next(iter(policy.gold.values())).value if policy.gold else math.inf, policy.label)
    if sort == "name":
        return (0.0, policy.label)
    score = paired.margin if sort == "margin" else paired.main
    return (-figures[f"{sort}/{score}"].value, policy.label)


def _difference(paired: "PairedSet", label: str, measure: str, *, percent: bool = False) -> str:
    found = paired.differences.get(label, {}).get(measure)
    if found is None:
        return ""
    mark = SIGNIFICANT if found.p_holm < 0.05 else " "
    return f"{text(found.estimate, percent=percent, signed=True)} {mark}"


def _p(paired: "PairedSet", label: str) -> str:
    found = paired.differences.get(label, {}).get("accuracy/main")
    return "" if found is None else f"{found.p_holm:.3f}" if found.p_holm >= 0.001 else "< 0.001"


def _gold(policy: "Policy", dimension: str) -> str:
    known = policy.gold or {}
    return text(known[dimension]) if dimension in known else ""


def _changed(paired: "PairedSet", label: str) -> str:
    changes = paired.changes.get(label)
    if changes is None:
        return ""
    to_chosen = sum(each.to == "chosen" for each in changes)
    return f"{to_chosen}/{len(changes) - to_chosen}"
