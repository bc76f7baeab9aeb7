"""The pages of an evaluation and of a comparison: complete, safe, the same each time."""

import re
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from prefopt_cli.evaluation.pages.compare_page import compare_page
from prefopt_cli.evaluation.pages.page import VOID
from prefopt_cli.evaluation.pages.plots import PlotData
from prefopt_cli.evaluation.pages.report import report_page
from tests.evaluation.pages.summaries import HOSTILE, comparison, estimate, evaluation, plot_data

MADE = "prefopt 0.1.0, 2026-11-22 11:03 UTC"


class Page(HTMLParser):
    """What a page holds; fails where an element is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + " "

    def values(self, name: str) -> list[str]:
        """What an attribute says, wherever it stands."""
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


def report(summary: dict[str, Any], pairs: dict[str, PlotData] | None = None, title: str = "A policy") -> str:
    if pairs is None:
        pairs = {"helpful": plot_data(308), "harmless": plot_data(308, reference=False)}
    return report_page(summary, pairs, title=title, made=MADE)


def compared(summary: dict[str, Any], title: str = "Three runs") -> str:
    return compare_page(summary, title=title, made=MADE)


def renamed(value: Any, old: str, new: str) -> Any:
    """The same, with one name exchanged wherever it is a key or a whole text."""
    if isinstance(value, dict):
        return {new if key == old else key: renamed(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [renamed(each, old, new) for each in value]
    return new if value == old else value


@pytest.fixture(scope="module", params=["eval", "compare"])
def html(request: pytest.FixtureRequest) -> str:
    return report(evaluation()) if request.param == "eval" else compared(comparison())


def test_a_page_is_html_that_fetches_nothing(html: str) -> None:
    page = Page(html)
    assert "http:" not in html
    assert "https:" not in html
    assert not [name for name, _ in page.tags if name in ("link", "img", "iframe", "object", "embed", "base")]
    assert all(each.startswith("#") for each in page.values("href"))
    assert page.values("src") == []
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]


def test_ids_are_unique_and_all_references_lead_somewhere(html: str) -> None:
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    referred = {each.removeprefix("#") for each in page.values("href")} | set(
        re.findall(r"url\(#([^)]*)\)", html)
    )
    assert referred <= set(ids)


def test_plots_say_in_words_what_they_show(html: str) -> None:
    drawn = [attributes for name, attributes in Page(html).tags if name == "svg"]
    assert len(drawn) >= 6
    assert all(each["role"] == "img" and len(each["aria-label"] or "") > 20 for each in drawn)


def test_plots_take_the_colours_of_the_page(html: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []
        assert "var(--" in svg
        assert "<style" not in svg
        assert "font-family" not in svg
    for name in set(re.findall(r"var\((--\w+)\)", html)):
        assert html.count(f"{name}:") >= 2, f"{name} has no value for light or none for dark"


def test_the_same_input_gives_the_same_bytes() -> None:
    assert report(evaluation()) == report(evaluation())
    assert compared(comparison()) == compared(comparison())


def written(figure: float, name: str) -> str:
    """A figure as the page is to show it."""
    if "accuracy" in name or "flipped" in name or name in ("length_only", "majority", "ece"):
        return f"{100 * figure:.1f}"
    digits = 1 if name.startswith("tokens/") else 3 if name in ("log_loss", "brier", "scale") else 2
    return f"{figure:.{digits}f}"


def test_every_figure_of_a_set_is_on_the_page() -> None:
    summary = evaluation()
    text = Page(report(summary)).text
    for found in summary["sets"].values():
        baselines = found["baselines"]
        figures = {
            **found["figures"],
            "length_only": baselines["length_only"]["accuracy"],
            "majority": baselines["majority"]["accuracy"],
            "gain/accuracy/length": baselines["gain/length_only"],
        }
        calibration = found["calibration"] or {}
        figures |= {name: calibration[name] for name in ("ece", "log_loss", "brier", "scale") if calibration}
        for name, each in figures.items():
            low, high = written(each["low"], name), written(each["high"], name)
            assert re.search(re.escape(written(each["value"], name)) + rf"%? +\[{low}, {high}\]", text), name
        for row in (*found["by_length"], *calibration.get("bins", ())):
            low, high = (f"{100 * row['accuracy'][part]:.1f}" for part in ("low", "high"))
            assert f"{100 * row['accuracy']['value']:.1f}% [{low}, {high}]" in text
        for each in (found["ranking"] or {"kendall_tau": {}})["kendall_tau"].values():
            assert f"[{each['low']:.2f}, {each['high']:.2f}]" in text
        assert all(reason in text for reason in found["dropped"])
        assert all(note in text for note in found["notes"])
        assert found["data"] in text
    assert all(each["text"] in text for each in summary["findings"])
    assert all(word in text for word in ("Warning", "Note", "Good"))


def test_every_figure_of_a_comparison_is_on_the_page() -> None:
    summary = comparison()
    text = Page(compared(summary)).text
    for policy in summary["policies"]:
        assert policy["name"] in text
        for found in policy["sets"].values():
            for name, each in found["figures"].items():
                low, high = written(each["low"], name), written(each["high"], name)
                assert f"[{low}, {high}]" in text
            for name, each in (found["differences"] or {}).items():
                factor, digits = (100, 1) if "accuracy" in name else (1, 2)
                shown = [f"{factor * each[part]:.{digits}f}" for part in ("value", "low", "high")]
                assert "{} [{}, {}]".format(*shown) in text
                assert f"{each['p_holm']:.3f}" in text
    assert "its tokenizer is another one" in text
    assert "31 12" in re.sub(" +", " ", text)
    assert all(each["chosen"] in text for each in summary["changed"]["helpful"])


def test_a_figure_without_a_name_is_shown_all_the_same() -> None:
    summary = evaluation()
    summary["sets"]["helpful"]["figures"]["surprise"] = estimate(12.34, 1.0)
    text = Page(report(summary)).text
    assert "surprise" in text
    assert "12.34" in text


@pytest.mark.filterwarnings("error")
def test_hostile_texts_stay_texts() -> None:
    summary = renamed(evaluation(), "helpful", HOSTILE)
    found = summary["sets"][HOSTILE]
    found["notes"], found["dropped"] = [HOSTILE], {HOSTILE: 3}
    summary["policy"].update(
        name=HOSTILE, description=HOSTILE + ".", run_id=HOSTILE, method={"name": HOSTILE, "f": [HOSTILE]}
    )
    summary["findings"][0].update(code=HOSTILE, text=HOSTILE)
    pairs = {HOSTILE: plot_data(40), "harmless": plot_data(40, reference=False)}
    told = renamed(comparison(), "gpo-js", HOSTILE)
    told = renamed(renamed(told, "helpful", HOSTILE + "2"), "runs/gpo-js", HOSTILE)
    for each in told["changed"][HOSTILE + "2"]:
        each.update(prompt=HOSTILE, chosen=HOSTILE, rejected=HOSTILE, id=HOSTILE)
    told["skipped"][0].update(name=HOSTILE, reason=HOSTILE)
    for made, scripts in ((report(summary, pairs, HOSTILE), 0), (compared(told, HOSTILE), 1)):
        made.encode("utf-8")
        page = Page(made)
        assert [name for name, _ in page.tags].count("script") == scripts
        assert "<script>alert" not in made
        assert "\x00" not in made
        # Not a formula, not cut at the dollar.
        assert "<script>alert('x')</script> $\\frac{1}{2}$ \"quoted\" & שלום" in page.text


def test_nothing_to_remark_and_a_single_pair() -> None:
    summary = evaluation(findings=False)
    one = summary["sets"]["helpful"]
    one.update(pairs=1, prompts=1, rows=1, by_length=one["by_length"][:1])
    one["calibration"]["bins"] = one["calibration"]["bins"][:1]
    one["by_length"][0].update({"from": 3, "to": 3, "pairs": 1, "prompts": 1})
    for each in one["figures"].values():
        each.update(low=each["value"], high=each["value"])
    pair = PlotData(*(np.array([0.0]) for _ in range(6)))
    text = Page(report(summary, {"helpful": pair, "harmless": plot_data(2, reference=False)})).text
    assert "Nothing stands out" in text
    assert "1 pair of 1 prompt." in text
    assert "1 at 0." in text


def test_figures_that_are_not_defined_are_dashes() -> None:
    summary = evaluation()
    found = summary["sets"]["helpful"]
    found["ranking"]["kendall_tau"]["reward"] = estimate(float("nan"), 0.0)
    found["figures"]["margin/reward"] = None
    found["by_length"][0]["accuracy"] = None
    text = Page(report(summary)).text
    assert "nan" not in text.lower()
    assert "–" in text


def test_no_reference_and_no_pairs_leave_their_plots_out() -> None:
    summary = evaluation()
    text = Page(report(summary, {})).text
    assert "Policy against reference" not in text
    assert "There is no reward" in text


def test_a_run_that_was_left_out_is_named_with_its_reason() -> None:
    summary = comparison()
    summary["policies"][2].update(skipped="it has no policy yet", sets={}, kl=None, gold=None)
    summary["policies"][1].update(kl=None, gold=None, method=None)
    summary["skipped"] = []
    text = Page(compared(summary)).text
    assert "it has no policy yet" in text
    without_kl = deepcopy(summary)
    without_kl["kl"] = None
    for policy in without_kl["policies"]:
        policy["kl"] = None
    assert "KL against accuracy" not in Page(compared(without_kl)).text


def test_a_policy_without_a_reward_is_shown_by_its_own_main_score() -> None:
    summary = comparison()
    found = summary["policies"][2]["sets"]["helpful"]
    found["main"] = "logp"
    del found["figures"]["accuracy/reward"]
    del found["differences"]["margin/main"]
    page = Page(compared(summary))
    shown = "{value:.1f}% [{low:.1f}, {high:.1f}]".format(
        **{part: 100 * each for part, each in found["figures"]["accuracy/logp"].items()}
    )
    assert f"{shown}, by log-probability" in page.text
    assert "accuracy by each policy's main score" in page.text
    assert any(f"gpo-js (by log-probability) {shown}" in said for said in page.values("aria-label"))


def test_large_sets_make_no_large_pages() -> None:
    many = {"helpful": plot_data(4642), "harmless": plot_data(4642, reference=False)}
    assert len(report(evaluation(), many).encode("utf-8")) < 400_000
    labels = tuple(f"run-{number}" for number in range(12))
    assert len(compared(comparison(labels)).encode("utf-8")) < 400_000
