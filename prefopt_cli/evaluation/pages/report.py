"""The report of an evaluation: one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt_cli.evaluation.pages.page import (
    Html,
    details,
    facts,
    isolated,
    joined,
    page,
    section,
    tag,
)
from prefopt_cli.evaluation.pages.plots import PlotData
from prefopt_cli.evaluation.pages.report_set import report_set
from prefopt_cli.evaluation.pages.wording import (
    GLOSSARY,
    NOTHING,
    SCORES,
    count,
    interval,
    method,
    percent,
    points,
    value,
)

WEIGHTS = {"warning": "▲ Warning", "note": "● Note", "good": "✓ Good"}
"""In the order in which findings stand; a word and a sign, so that colour says nothing alone."""


def report_page(summary: Mapping[str, Any], pairs: Mapping[str, PlotData], *, title: str, made: str) -> str:
    """The whole page; the same evaluation gives the same bytes.

    Args:
        summary: what `summary.json` holds.
        pairs: by set, the figures of each pair, for the plots.
        title: the page's heading.
        made: what made the report, and when.
    """
    sets = summary["sets"]
    keys = {name: f"set-{place}" for place, name in enumerate(sets, start=1)}
    parts = [
        _subject(summary),
        tag("div", *(_card(name, found, keys[name]) for name, found in sets.items()), class_="cards"),
        section("Findings", findings(summary["findings"])),
    ]
    parts += [
        report_set(name, found, pairs.get(name), key=keys[name], level=summary["level"])
        for name, found in sets.items()
    ]
    return page(title, made, *parts, glossary(), _scores(summary["scores"]))


def findings(found: Sequence[Mapping[str, Any]]) -> Html:
    """What stands out, the gravest first."""
    if not found:
        return tag("p", "Nothing stands out by the rules that findings follow.")
    order = list(WEIGHTS)
    items = []
    for each in sorted(found, key=lambda one: order.index(one["weight"])):
        rule = str(each["code"]).replace("_", " ")
        if each.get("figure") is not None:
            rule += f": {each['figure']:.4g}"
        if each.get("threshold") is not None:
            rule += f"; threshold {each['threshold']:.4g}"
        begins = [
            tag("strong", WEIGHTS[each["weight"]]),
            *([isolated(each["set"])] if each.get("set") else []),
        ]
        items.append(
            tag(
                "li",
                tag("p", *begins),
                tag("p", each["text"]),
                tag("p", rule, class_="small"),
                "\n",
                class_=each["weight"],
            )
        )
    return tag("ul", *items, class_="findings")


def glossary() -> Html:
    """How the figures are defined."""
    defined = facts(GLOSSARY.items(), wide=True)
    return section("How the figures are defined", details("Terms and definitions", defined))


def _subject(summary: Mapping[str, Any]) -> Html:
    """What was evaluated, against what, on what."""
    policy, reference, reward = summary["policy"], summary["reference"], summary["reward"]
    without = "none: responses are scored by the policy's log-probability"
    rows = [
        ("Policy", _named(policy)),
        ("Method", method(policy["method"])),
        ("Reference", _named(reference) if reference else without),
        ("Reward", _reward(reward)),
    ]
    return facts((term, said) for term, said in rows if said != NOTHING)


def _scores(scores: Mapping[str, int]) -> Html:
    computed = count(scores["computed"], "log-probability was", "log-probabilities were")
    return tag("p", f"{computed} computed, {scores['from_cache']} came from the cache.", class_="small")


def _named(policy: Mapping[str, Any]) -> Html:
    shown = [policy[key] for key in ("name", "description") if policy.get(key)]
    told = [
        isolated(shown[0]),
        *(joined([" (", isolated(more), ")"]) for more in shown[1:] if more != shown[0]),
    ]
    if policy.get("run_id"):
        told.append(joined([", run ", isolated(policy["run_id"])]))
    return joined(told)


def _reward(reward: Mapping[str, Any] | None) -> str:
    if not reward:
        return NOTHING
    per_token = ", per token" if reward["per_token"] else ""
    return f"{reward['formula']}, {reward['scale_name']} = {reward['scale']:g}{per_token}"


def _card(name: str, found: Mapping[str, Any], key: str) -> Html:
    """The headline of a set."""
    main, baselines = found["main"], found["baselines"]
    accuracy, alone = found["figures"][f"accuracy/{main}"], baselines["length_only"]
    lines = [
        f"accuracy by {SCORES[main]}, {count(found['pairs'], 'pair')}",
        f"length alone: {percent(alone['accuracy']['value'])}; "
        f"difference {_points(baselines['gain/length_only'])}",
    ]
    if gain := found["figures"].get("gain/accuracy/logp"):
        lines.append(f"policy - reference, by log-probability: {_points(gain)}")
    big = joined([value(accuracy, share=True), " ", tag("span", interval(accuracy, share=True))])
    return tag(
        "div",
        tag("h3", tag("a", isolated(name), href=f"#{key}")),
        tag("p", big, class_="headline"),
        *(tag("p", line, class_="small") for line in lines),
        "\n",
        class_="card",
    )


def _points(estimate: Mapping[str, Any]) -> str:
    return f"{points(estimate)} points {interval(estimate, share=True)}"
