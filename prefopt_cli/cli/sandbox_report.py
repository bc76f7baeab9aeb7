"""How a sandbox score looks on paper."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefopt_cli.cli.tables import Column, print_hanging, print_line, print_table
from prefopt_cli.sandbox.names import DIMENSIONS
from prefopt_cli.sandbox.origin import is_base

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.evaluation.statistics import Estimate
    from prefopt_cli.sandbox.score import Report, Score, Shown

SIGNIFICANT = "*"

PERCENT = ("distinct", "well_formed", "heldout/logp_accuracy", "heldout/reward_accuracy")

ROWS = {
    "accuracy, %": {"log-prob": "heldout/logp_accuracy", "reward": "heldout/reward_accuracy"},
    "in nats": {"KL": "kl", "entropy": "entropy"},
    "replies, %": {"distinct": "distinct", "well-formed": "well_formed"},
    "TV to target": "total_variation",
}
"""Title -> metric, or the metrics under that title. Rewards and win rates stand above them.

Short, so that with the longest figures the table of one run is 80 columns wide.
"""


def print_report(report: "Report", show: int, console: "Console") -> None:
    """Sample replies if any are wanted, the figures, and what they mean."""
    from prefopt_cli.evaluation.labels import labels

    names = labels([score.name for score in (report.opponent, *report.policies)])
    if show:
        _print_samples(report, show, names, console)
    if len(report.policies) == 1:
        _print_one(report, console)
    else:
        _print_many(report, names, console)
    print_line(console)
    for note in _notes(report, names):
        print_line(console, note)


def _sides(report: "Report") -> tuple[str, str]:
    """What the opponent and the one policy are to each other."""
    return ("before", "after") if is_base(report.opponent.name) else ("against", "run")


def _print_one(report: "Report", console: "Console") -> None:
    """Before, after and difference: a row per figure."""
    from prefopt_cli.evaluation.statistics import Estimate

    after, before = report.policies[0], report.opponent
    sides = _sides(report)
    for side, score in zip(sides, (before, after), strict=True):
        print_line(console, f"{side + ':':<8} {score.name}")
    print_line(console)
    rows: list[tuple[str, str, str, str]] = []

    def add(title: str, metric: str) -> None:
        percent = metric in PERCENT
        rows.append(
            (
                title,
                _text(before.figures[metric], percent=percent),
                _text(after.figures[metric], percent=percent),
                _change(after.changes[metric], percent=percent),
            )
        )

    rows.append(("win rate, %", "", "", ""))
    own = {len(rows) + list(DIMENSIONS).index(report.dimension)}
    for name in DIMENSIONS:
        won = after.win_rates[name]
        lead = Estimate(*(part - 0.5 for part in won))
        rows.append((f" {name}", "50.0", _text(won, percent=True), _change(lead, percent=True)))
    rows.append(("gold reward", "", "", ""))
    own.add(len(rows) + list(DIMENSIONS).index(report.dimension))
    for name in DIMENSIONS:
        add(f" {name}", f"reward/{name}")
    for title, metric in ROWS.items():
        if isinstance(metric, dict):
            rows.append((title, "", "", ""))
            for part, each in metric.items():
                add(f" {part}", each)
        elif metric in after.figures:
            add(title, metric)
    first, *others = zip(*rows, strict=True)
    # The marks stand under the two spaces.
    columns = [Column(title, cells) for title, cells in zip((*sides, "difference  "), others, strict=True)]
    print_table(console, Column("", first), columns, bold=own)


def _print_many(report: "Report", names: dict[str, str], console: "Console") -> None:
    """A row per policy, by what the first of them was trained for."""
    own = report.dimension
    policies = [each for each in report.policies if each.name != report.opponent.name]
    scores = [report.opponent, *policies]

    def figures(metric: str) -> list[str]:
        return [_text(each.figures[metric], percent=metric in PERCENT) for each in scores]

    columns = [
        Column(f"win rate, %\n{own}  ", ["50.0  ", *(_won(each, own) for each in policies)]),
        Column(
            f"reward difference  \n{own}  ",
            ["", *(_change(each.changes[f"reward/{own}"]) for each in policies)],
        ),
        Column(f"gold reward\n{own}", figures(f"reward/{own}")),
    ]
    columns += [
        Column(f"gold reward\n{name}", figures(f"reward/{name}")) for name in DIMENSIONS if name != own
    ]
    for title, metric in ROWS.items():
        if isinstance(metric, dict):
            columns += [Column(f"{title}\n{part}", figures(each)) for part, each in metric.items()]
        elif metric in report.opponent.figures:
            columns.append(Column(title, figures(metric)))
    print_table(console, Column("", [names[each.name] for each in scores]), columns)


def _won(score: "Score", dimension: str) -> str:
    won = score.win_rates[dimension]
    return f"{_text(won, percent=True)} {SIGNIFICANT if won.excludes(0.5) else ' '}"


def _change(estimate: "Estimate", *, percent: bool = False) -> str:
    """A difference with its mark, or a blank in the mark's place."""
    return f"{_text(estimate, percent=percent, signed=True)} {SIGNIFICANT if estimate.excludes(0.0) else ' '}"


def _text(estimate: "Estimate", *, percent: bool = False, signed: bool = False) -> str:
    """`1.23 [1.10, 1.36]`."""
    digits = 1 if percent or max(map(abs, estimate)) >= 10 else 2
    # Adding zero makes a zero of one that was rounded from below.
    value, low, high = (round((100 if percent else 1) * part, digits) + 0.0 for part in estimate)

    def shown(number: float, plus: str = "") -> str:
        # A whole hundred needs no digit, and not having it keeps the columns narrow.
        return f"{number:{plus}.{0 if percent and abs(number) == 100 else digits}f}"

    return f"{shown(value, '+' if signed and value else '')} [{shown(low)}, {shown(high)}]"


def _print_samples(report: "Report", show: int, names: dict[str, str], console: "Console") -> None:
    if len(report.policies) == 1:
        titles = dict(zip((report.opponent.name, report.policies[0].name), _sides(report), strict=True))
    else:
        titles = names
    label = max(map(len, titles.values()))
    what = "prompt" if show == 1 else f"{show} prompts"
    print_line(
        console, f"First replies to the first {what}, each with its gold reward in {report.dimension}:"
    )
    print_line(console)
    for prompt, replies in report.shown(show):
        print_line(console, prompt.text)
        for each in replies:
            begins = f"  {titles[each.policy]:<{label}}  {each.rewards[report.dimension]:5.2f}  "
            print_hanging(console, begins, _reply(each))
        print_line(console)


def _reply(shown: "Shown") -> str:
    # The policy knows the line break that stands in prompts.
    text = shown.text.strip().replace("\n", "\\n")
    return text if shown.well_formed else f"(not well-formed) {text}"


def _notes(report: "Report", names: dict[str, str]) -> Iterator[str]:
    settings, against = report.settings, names[report.opponent.name]
    yield (
        f"{SIGNIFICANT} significant: the 95 % interval (in brackets) of the difference to {against} excludes zero, "
        "of a win rate 50 %."
    )
    yield (
        f"{len(report.prompts)} held-out prompts, {settings.per_prompt} samples each; a win is a higher gold reward "
        f"than that of a sample of {against} to the same prompt. KL is to the base policy."
    )
    yield (
        f"accuracy: held-out pairs labelled by {report.dimension} at temperature {report.temperature:g}, told by the "
        f"policy's log-probabilities or implicit rewards; the gold reward itself gets {report.attainable:.1%}."
    )
    if report.target:
        where = "the first prompt" if settings.exact_prompts == 1 else f"{settings.exact_prompts} prompts"
        yield f"TV: exact total variation to {report.target} on {where}."
    else:
        yield f"No total variation to a target: {report.target_note}."
