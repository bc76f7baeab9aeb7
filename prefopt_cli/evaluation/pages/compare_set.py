"""One set's part of a comparison's page: figures, paired differences, pairs that changed sides."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt_cli.evaluation.pages.interval_plot import Row, intervals
from prefopt_cli.evaluation.pages.page import Html, details, isolated, joined, section, table, tag
from prefopt_cli.evaluation.pages.wording import (
    NOTHING,
    SCORES,
    both,
    count,
    grouped,
    interval,
    is_difference,
    is_share,
    number,
    p_value,
    points,
)

CALIBRATION = {"ece": "ECE", "log_loss": "log loss", "brier": "Brier score", "scale": "scale that fits best"}

Policies = Sequence[Mapping[str, Any]]


def compare_set(name: str, summary: Mapping[str, Any], compared: Policies, *, key: str) -> Html:
    """The section about a set.

    Args:
        name: the set's.
        summary: the comparison's.
        compared: the policies that were not left out.
        key: what the section's ids begin with.
    """
    about = summary["sets"][name]
    policies = [policy for policy in compared if name in policy["sets"]]
    others = [policy for policy in policies if policy["sets"][name]["differences"]]
    size = f"{count(about['pairs'], 'pair')} of {count(about['prompts'], 'prompt')}."
    if about["left_out"]:
        size += f" {count(about['left_out'], 'row')} that not every run could score left out."
    parts: list[Html] = [tag("p", size)]
    parts += [tag("div", *_plots(name, policies, others, about["main"], key), class_="plots")]
    if others:
        parts += [
            tag("h3", "Differences to the baseline"),
            _differences(name, others, about["main"], summary),
        ]
    parts += [details("All figures", _figures(name, policies))]
    parts += _changed(name, others, summary["changed"].get(name, ()))
    return section(isolated(name), *parts, id=key)


def _plots(name: str, policies: Policies, others: Policies, main: str, key: str) -> Iterator[Html]:
    rows = []
    for policy in policies:
        own = policy["sets"][name].get("main", main)
        label = policy["label"] if own == main else f"{policy['label']} (by {SCORES[own]})"
        rows.append(Row(label, policy["sets"][name]["figures"].get(f"accuracy/{own}"), own=policy in others))
    title = f"Accuracy by {SCORES[main]}"
    yield intervals(title, rows, key=f"{key}-accuracy", centre=0.5, axis="accuracy, %", scale=100)
    if others:
        rows = [Row(each["label"], each["sets"][name]["differences"]["accuracy/main"]) for each in others]
        title, axis = "Difference in accuracy to the baseline", "percentage points"
        yield intervals(title, rows, key=f"{key}-difference", centre=0.0, axis=axis, scale=100)


def _differences(name: str, others: Policies, main: str, summary: Mapping[str, Any]) -> Html:
    """Run - baseline, pair by pair, and how many pairs changed sides."""
    measures = {
        "accuracy/main": f"accuracy by {SCORES[main]}, points",
        "accuracy/logp": "accuracy by log-probability, points",
        "margin/main": f"margin by {SCORES[main]}",
        "margin/logp": "margin by log-probability, nats",
    }
    if any(policy["sets"][name].get("main", main) != main for policy in others):
        # What has no reward is compared by its log-probability.
        measures["accuracy/main"] = "accuracy by each policy's main score, points"
    groups = []
    for measure, said in measures.items():
        rows = []
        for policy in others:
            found = policy["sets"][name]["differences"].get(measure)
            if found is None:
                continue
            share = is_share(measure)
            shown = f"{points(found)} {interval(found, share=True)}" if share else _signed(both(found))
            rows.append((isolated(policy["label"]), shown, p_value(found["p"]), p_value(found["p_holm"])))
        if rows:
            groups.append((said, rows))
    head = ("run", f"difference, {100 * summary['level']:g}% interval", "p", "p, Holm")
    explained = (
        "Run - baseline, pair by pair. p: from a permutation test that turns the signs of whole prompts. Holm: "
        "adjusted for all runs and sets."
    )
    return joined([table(f"Differences on {name}", head, groups), tag("p", explained, class_="small")])


def _signed(text: str) -> str:
    return text if text.startswith("-") else f"+{text}"


def _figures(name: str, policies: Policies) -> Html:
    """A column per policy."""
    found = [policy["sets"][name] for policy in policies]
    names = dict.fromkeys(figure for each in found for figure in each["figures"])
    groups: list[tuple[str, list[list[str]]]] = []
    for group, members in grouped(names):
        rows = [
            [said, *(_cell(figure, each["figures"].get(figure)) for each in found)]
            for figure, said in members.items()
        ]
        groups.append((group, rows))
    if any(each["calibration"] for each in found):
        rows = [
            [said, *(_calibration(figure, (each["calibration"] or {}).get(figure)) for each in found)]
            for figure, said in CALIBRATION.items()
        ]
        groups.append(("Calibration", rows))
    return table(f"All figures on {name}", ["", *(isolated(each["label"]) for each in policies)], groups)


def _cell(figure: str, estimate: Mapping[str, Any] | None) -> str:
    if is_difference(figure):
        return f"{points(estimate)} {interval(estimate, share=True)}" if estimate else NOTHING
    return both(estimate, share=is_share(figure), digits=1 if figure.startswith("tokens/") else 2)


def _calibration(figure: str, estimate: Mapping[str, Any] | None) -> str:
    return both(estimate, share=figure == "ece", digits=3)


def _changed(name: str, others: Policies, changed: Sequence[Mapping[str, Any]]) -> list[Html]:
    """How many pairs changed sides and, folded away, those that did so most."""
    counted = [(policy["label"], policy["sets"][name]["changed"]) for policy in others]
    rows = [
        (isolated(label), str(found["to_chosen"]), str(found["to_rejected"]))
        for label, found in counted
        if found
    ]
    if not rows:
        return []
    title = "Pairs that changed sides"
    parts = [tag("h3", title), table(f"{title} on {name}", ("run", "now right", "now wrong"), [(None, rows)])]
    for policy in others:
        own = [each for each in changed if each["policy"] in (policy["label"], policy["name"])]
        if own:
            shown = joined([isolated(policy["label"]), f": {count(len(own), 'pair')}, the largest changes"])
            parts.append(details(shown, *(_pair(each) for each in own)))
    return parts


def _pair(each: Mapping[str, Any]) -> Html:
    side = "✓ now right" if each["to"] == "chosen" else "✗ now wrong"
    margins = f"margin {number(each['baseline_margin'])} → {number(each['margin'])}, {side}"
    texts = (
        joined([tag("h4", said), tag("div", each[part], class_="text", dir="auto")])
        for said, part in (("Prompt", "prompt"), ("Chosen", "chosen"), ("Rejected", "rejected"))
    )
    return tag("div", details(joined([isolated(str(each["id"])), ": ", margins]), *texts), class_="inner")
