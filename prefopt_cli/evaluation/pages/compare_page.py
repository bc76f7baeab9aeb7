"""The page of a comparison: one HTML file that needs nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt_cli.evaluation.pages.compare_plot import kl_plot
from prefopt_cli.evaluation.pages.compare_set import compare_set
from prefopt_cli.evaluation.pages.page import (
    Html,
    details,
    facts,
    isolated,
    joined,
    listed,
    page,
    section,
    table,
    tag,
)
from prefopt_cli.evaluation.pages.report import findings, glossary
from prefopt_cli.evaluation.pages.wording import NOTHING, SCORES, both, count, method


def compare_page(summary: Mapping[str, Any], *, title: str, made: str) -> str:
    """The whole page; the same comparison gives the same bytes.

    Args:
        summary: what the comparison's `summary.json` holds.
        title: the page's heading.
        made: what made the page, and when.
    """
    sets = {name: f"set-{place}" for place, name in enumerate(summary["sets"], start=1)}
    compared = [policy for policy in summary["policies"] if not policy["skipped"]]
    parts = [
        _subject(summary, compared, sets),
        *_skipped(summary),
        section("Runs", _runs(summary, compared), _methods(compared)),
        section("Findings", findings(summary["findings"])),
        *_kl(summary, compared, sets),
    ]
    parts += [compare_set(name, summary, compared, key=key) for name, key in sets.items()]
    return page(title, made, *parts, glossary(), script=True)


def _subject(
    summary: Mapping[str, Any], compared: Sequence[Mapping[str, Any]], sets: Mapping[str, str]
) -> Html:
    baseline = next((each["label"] for each in compared if each["name"] == summary["baseline"]), NOTHING)
    shown: list[str] = [isolated(baseline)]
    if baseline != summary["baseline"]:
        shown += [" (", isolated(summary["baseline"]), ")"]
    items = []
    for name, key in sets.items():
        about = summary["sets"][name]
        size = (
            f": {count(about['pairs'], 'pair')} of {count(about['prompts'], 'prompt')}, scored by every run"
        )
        items.append(joined([tag("a", isolated(name), href=f"#{key}"), size]))
    rows = [("Runs", str(len(compared))), ("Baseline", joined(shown)), ("Sets", listed(items))]
    if kl := summary["kl"]:
        rows.append(
            ("KL", f"from {count(kl['prompts'], 'prompt')}, {kl['max_new_tokens']} new tokens at most")
        )
    return facts(rows)


def _skipped(summary: Mapping[str, Any]) -> Iterator[Html]:
    """Runs and policies that were left out, and why."""
    reasons = [(each["name"], each["reason"]) for each in summary["skipped"]]
    named = {name for name, _ in reasons}
    reasons += [
        (each["name"], each["skipped"])
        for each in summary["policies"]
        if each["skipped"] and each["name"] not in named
    ]
    if reasons:
        items = (joined([isolated(name), ": ", isolated(reason)]) for name, reason in reasons)
        yield section("Left out", listed(items))


def _runs(summary: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> Html:
    """A row per run: what it is and its main figures."""
    golds = list(dict.fromkeys(name for policy in compared for name in policy["gold"] or ()))
    head = ["run", *(f"accuracy on {name}" for name in summary["sets"])]
    head += ["KL, nats"] if summary["kl"] else []
    head += [*(f"gold reward, {name}" for name in golds), "method", "reference"]
    rows = []
    for policy in compared:
        row: list[str] = [isolated(policy["label"])]
        for name, about in summary["sets"].items():
            found = policy["sets"].get(name)
            figures = found["figures"] if found else {}
            main = found.get("main", about["main"]) if found else about["main"]
            other = "" if main == about["main"] else f", by {SCORES[main]}"
            row.append(both(figures.get(f"accuracy/{main}"), share=True) + other)
        row += [both(policy["kl"])] if summary["kl"] else []
        row += [both((policy["gold"] or {}).get(name)) for name in golds]
        row.append(isolated((policy["method"] or {}).get("name", NOTHING)))
        row.append(isolated(policy["reference"] or NOTHING))
        rows.append(row)
    return table("Runs", [isolated(title) for title in head], [(None, rows)], sortable=True)


def _methods(compared: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for policy in compared:
        where = [] if policy["name"] == policy["label"] else [isolated(policy["name"]), ": "]
        rows.append((isolated(policy["label"]), joined([*where, isolated(method(policy["method"]))])))
    return details("Folders and settings", facts(rows, wide=True))


def _kl(
    summary: Mapping[str, Any], compared: Sequence[Mapping[str, Any]], sets: Mapping[str, str]
) -> Iterator[Html]:
    """KL against accuracy, a plot per set."""
    plots = []
    for name, key in sets.items():
        main = summary["sets"][name]["main"]
        points = [
            (policy["label"], policy["kl"], policy["sets"][name]["figures"].get(f"accuracy/{main}"))
            for policy in compared
            if policy["kl"] and name in policy["sets"]
        ]
        if points:
            plots.append(kl_plot(points, title=name, key=f"{key}-kl", score=SCORES[main]))
    if plots:
        yield section("KL against accuracy", tag("div", *plots, class_="plots"))
