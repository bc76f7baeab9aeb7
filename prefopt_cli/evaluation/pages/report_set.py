"""One set's part of an evaluation's report: tables, plots, receipt."""

from collections.abc import Iterator, Mapping
from typing import Any

from prefopt_cli.evaluation.pages.interval_plot import Row, intervals
from prefopt_cli.evaluation.pages.page import (
    Html,
    details,
    facts,
    isolated,
    joined,
    listed,
    section,
    table,
    tag,
)
from prefopt_cli.evaluation.pages.planes import changes, flips
from prefopt_cli.evaluation.pages.plots import PlotData, bucket_name, by_length, histogram, reliability
from prefopt_cli.evaluation.pages.wording import (
    FIGURES,
    SCORES,
    both,
    count,
    grouped,
    interval,
    is_difference,
    is_share,
    number,
    percent,
    points,
    value,
)

WITHOUT_REFERENCE = "There is no reward: nothing is said about calibration, which needs a reward's margins."
ACCURACIES = tuple(FIGURES["Accuracy"])


def report_set(
    name: str, found: Mapping[str, Any], pairs: PlotData | None, *, key: str, level: float
) -> Html:
    """The section about a set.

    Args:
        name: the set's.
        found: what the summary holds about it.
        pairs: for the plots that show pairs; None leaves them out.
        key: what the section's ids begin with.
        level: of the intervals.
    """
    lists = (
        f" {count(found['lists'], 'row has', 'rows have')} more than two responses." if found["lists"] else ""
    )
    size = f"{count(found['pairs'], 'pair')} of {count(found['prompts'], 'prompt')}.{lists}"
    estimates = _estimates(found)
    return section(
        isolated(name),
        tag("p", size),
        tag("h3", "Figures"),
        tag(
            "div",
            _figures(name, estimates, found["baselines"]["length_only"]["rule"], level),
            tag("div", *_interval_plots(estimates, key), class_="stack"),
            class_="beside",
        ),
        tag("h3", "Pairs"),
        tag("div", *_pair_plots(found, pairs, key), class_="plots"),
        *([tag("p", WITHOUT_REFERENCE, class_="small")] if not found["calibration"] else []),
        _buckets(found["by_length"], level),
        *(_calibration(found["calibration"], level) if found["calibration"] else ()),
        *(_ranking(found["ranking"], level) if found["ranking"] else ()),
        *_receipt(found),
        id=key,
    )


def _estimates(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures and, beside them, what the baselines reach."""
    baselines = found["baselines"]
    return {
        **found["figures"],
        "length_only": baselines["length_only"]["accuracy"],
        "majority": baselines["majority"]["accuracy"],
        "gain/length_only": baselines["gain/length_only"],
    }


def _figures(name: str, estimates: Mapping[str, Any], rule: str, level: float) -> Html:
    groups = []
    for group, members in grouped(estimates):
        rows = []
        for figure, said in members.items():
            digits = 1 if figure.startswith("tokens/") else 2
            shown: Any = {"share": is_share(figure), "digits": digits}
            named = f"{said} (the {rule} response wins)" if figure == "length_only" else said
            estimate = estimates[figure]
            figure_alone = points(estimate) if is_difference(figure) else value(estimate, **shown)
            rows.append((named, figure_alone, interval(estimate, **shown)))
        groups.append((group, rows))
    return table(f"Figures of {name}", ("", "value", _interval_title(level)), groups)


def _interval_plots(estimates: Mapping[str, Any], key: str) -> Iterator[Html]:
    labels = FIGURES["Accuracy"]
    rows = [
        Row(labels[name], estimates[name], own=name.startswith("accuracy/"))
        for name in ACCURACIES
        if name in estimates
    ]
    yield intervals("Accuracy", rows, key=f"{key}-accuracy", centre=0.5, axis="accuracy, %", scale=100)
    gains = FIGURES["Difference in accuracy, in points"]
    rows = [Row(said, estimates[name]) for name, said in gains.items() if name in estimates]
    yield intervals(
        "Difference in accuracy", rows, key=f"{key}-gain", centre=0.0, axis="percentage points", scale=100
    )
    moved = FIGURES["Change, policy - reference, in nats"]
    rows = [Row(said, estimates[name]) for name, said in moved.items() if name in estimates]
    if rows:
        yield intervals("Change of log-probability", rows, key=f"{key}-change", centre=0.0, axis="nats")


def _pair_plots(found: Mapping[str, Any], pairs: PlotData | None, key: str) -> Iterator[Html]:
    score = SCORES[found["main"]]
    if pairs is not None:
        yield histogram(pairs, key=f"{key}-margins", score=score)
    if found["calibration"]:
        yield reliability(found["calibration"], key=f"{key}-reliability")
    if found["by_length"]:
        yield by_length(found["by_length"], key=f"{key}-length", score=score)
    if pairs is not None and pairs.reference_deltas is not None:
        yield flips(pairs, key=f"{key}-flips")
    if pairs is not None and pairs.change_chosen is not None and pairs.change_rejected is not None:
        yield changes(pairs, key=f"{key}-changes")


def _buckets(buckets: list[Mapping[str, Any]], level: float) -> Html:
    rows = [
        (
            bucket_name(bucket),
            str(bucket["pairs"]),
            str(bucket["prompts"]),
            both(bucket["accuracy"], share=True),
            both(bucket["length_only"], share=True),
        )
        for bucket in buckets
    ]
    head = ("chosen - rejected, tokens", "pairs", "prompts", "accuracy", "length alone")
    return details(
        f"Accuracy by difference in length, with {_interval_title(level)}s",
        table("Accuracy by difference in length", head, [(None, rows)]),
    )


def _calibration(found: Mapping[str, Any], level: float) -> Iterator[Html]:
    yield tag("h3", "Calibration")
    ece = (value(found["ece"], share=True), interval(found["ece"], share=True))
    rows = [
        ("expected calibration error", *ece),
        ("the same, if calibrated: 95th percentile", percent(found["ece_if_calibrated"]), ""),
    ]
    rows += [
        (said, value(found[name], digits=3), interval(found[name], digits=3))
        for name, said in (
            ("log_loss", "log loss"),
            ("brier", "Brier score"),
            ("scale", "scale that fits best"),
        )
    ]
    yield table("Calibration", ("", "value", _interval_title(level)), [(None, rows)])
    bins = [
        (
            f"{percent(each['low'])} to {percent(each['high'])}",
            str(each["pairs"]),
            percent(each["confidence"]),
            both(each["accuracy"], share=True),
        )
        for each in found["bins"]
    ]
    yield details("Bins", table("Bins", ("bin", "pairs", "confidence", "accuracy"), [(None, bins)]))


def _ranking(found: Mapping[str, Any], level: float) -> Iterator[Html]:
    yield tag("h3", "Ranking of lists")
    yield tag("p", f"{count(found['rows'], 'list')} with {count(found['responses'], 'response')}.")
    groups = []
    for title, name in (("Kendall's tau", "kendall_tau"), ("Best of n", "best_of_n")):
        share = name == "best_of_n"
        rows = [
            (f"by {SCORES.get(score, score)}", value(each, share=share), interval(each, share=share))
            for score, each in _in_order(found[name])
        ]
        if share:
            rows.append(("by chance", percent(found["best_of_n_chance"]), ""))
        groups.append((title, rows))
    yield table("Ranking of lists", ("", "value", _interval_title(level)), groups)


def _in_order(scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The main score first, as in the table of figures; one without a name last."""
    known = [(score, scores[score]) for score in SCORES if score in scores]
    return known + [(score, each) for score, each in scores.items() if score not in SCORES]


def _receipt(found: Mapping[str, Any]) -> Iterator[Html]:
    yield tag("h3", "Data")
    overlap = found["train_overlap"]
    rows = [("Rows scored", str(found["rows"])), ("Rows not scored", _dropped(found["dropped"]))]
    shared = "not known"
    if overlap:
        shared = f"{count(overlap['prompts'], 'prompt')}, {count(overlap['pairs'], 'pair')}"
    rows += [("Also in the training data", shared), ("sha256", tag("code", found["data"]))]
    yield facts(rows, wide=True)
    if found["notes"]:
        yield listed(isolated(note) for note in found["notes"])


def _dropped(reasons: Mapping[str, int]) -> Html:
    return joined(["none"]) if not reasons else listed(f"{number(n, 0)}: {why}" for why, n in reasons.items())


def _interval_title(level: float) -> str:
    return f"{100 * level:g}% interval"
