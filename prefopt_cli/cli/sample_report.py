"""How replies and verdicts look on a terminal."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt_cli.cli.tables import Column, print_hanging, print_line, print_table
from prefopt_cli.evaluation.judges.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.data.examples import Text
    from prefopt_cli.evaluation.judges.judging import Ruling, Tally
    from prefopt_cli.evaluation.side_by_side import Samples, Written
    from prefopt_cli.evaluation.statistics import Estimate

PROMPT, VERDICT = "prompt", "verdict"

LONGEST_LABEL = 24
"""Characters before a reply; a longer name is shortened."""


def print_samples(found: "Samples", console: "Console", folder: Path | None) -> None:
    """Every prompt with its replies, then the figures.

    Args:
        found: what to print.
        console: where to.
        folder: where the files are, if there are any.
    """
    names = _short_names(found)
    width = max(map(len, (PROMPT, *names, VERDICT if found.rulings else ""))) + 2
    for place, prompt in enumerate(found.asked.texts):
        _print_prompt(prompt, f"{PROMPT:<{width}}", console)
        for number in range(found.drawing.per_prompt):
            for name, written in zip(names, found.written, strict=True):
                _print_reply(written, place, number, f"{name:<{width}}", console)
            if found.rulings is not None:
                _print_ruling(found.rulings[place][number], names, f"{VERDICT:<{width}}", console)
        print_line(console)
    _print_figures(found, names, console)
    if names == ["A", "B"]:
        for name, written in zip(names, found.written, strict=True):
            print_line(console, f"{name}: {written.writer.name}")
    if found.tally:
        _print_tally(found.tally, names, found.judge or {}, console)
    if folder is not None:
        print_line(console, f"Files: {folder}")


def _short_names(found: "Samples") -> list[str]:
    """Names of the policies that leave the replies some room: of a long path its end, or else letters."""
    names = [written.writer.name for written in found.written]
    ends = [name if len(name) <= LONGEST_LABEL else Path(name).name for name in names]
    for short in (ends, [name[-LONGEST_LABEL:] for name in ends]):
        if len(set(short)) == len(names) and max(map(len, short)) <= LONGEST_LABEL:
            return short
    return ["A", "B"][: len(names)]


def _print_prompt(prompt: "Text", begins: str, console: "Console") -> None:
    if isinstance(prompt, str):
        _print_text(begins, prompt.strip("\n"), console)
        return
    for message in prompt:
        _print_text(begins, f"{message['role']}: {message['content']}", console)
        begins = " " * len(begins)


def _print_reply(written: "Written", place: int, number: int, begins: str, console: "Console") -> None:
    reply = written.replies[place][number]
    _print_text(begins, reply.text.strip() or "(nothing)", console)
    remarks = [] if reply.finished else [f"cut off after {reply.tokens} tokens"]
    if written.scores is not None:
        remarks.append(f"score {written.scores[place][number]:.3f}")
    if remarks:
        print_hanging(console, " " * len(begins), f"[{', '.join(remarks)}]")


def _print_text(begins: str, text: str, console: "Console") -> None:
    """Line by line, all in the column where the first begins."""
    for line in text.splitlines() or [""]:
        print_hanging(console, begins, printable(line))
        begins = " " * len(begins)


def _print_ruling(ruling: "Ruling", names: list[str], begins: str, console: "Console") -> None:
    from prefopt_cli.evaluation.judges.judging import Outcome

    own, other = names
    said = {
        Outcome.WON: f"{own} is better",
        Outcome.LOST: f"{other} is better",
        Outcome.TIED: "tie",
        Outcome.NO_VERDICT: f"none: {ruling.reason or 'no reason was given'}",
    }[ruling.outcome]
    if not ruling.asked:
        said = "tie: the replies are the same"
    elif ruling.outcome == Outcome.TIED and not ruling.agrees:
        said = "tie: the verdict changed with the order of the replies"
    print_hanging(console, begins, said)


def _print_figures(found: "Samples", names: list[str], console: "Console") -> None:
    written = found.written
    columns = [
        Column("replies", [str(len(each.all)) for each in written]),
        Column("tokens,\nmean", [f"{each.tokens:.1f}" for each in written]),
        Column("cut off", [str(each.cut_off) for each in written]),
    ]
    scores = [each.score(found.drawing.seed) for each in written]
    if found.judge and all(scores):
        columns.append(Column("score,\nmean [95 %]", [_estimate(score) for score in scores if score]))
    print_table(console, Column("policy", names), columns)
    drawing = found.drawing
    how = "greedy" if drawing.temperature == 0 else f"temperature {drawing.temperature:g}"
    top_p = f", top-p {drawing.top_p:g}" if drawing.top_p < 1 and drawing.temperature else ""
    seed = f", seed {drawing.seed}" if drawing.temperature else ""
    print_line(
        console,
        f"{found.asked.describe()} At most {found.asked.max_new_tokens} new tokens, {how}{top_p}{seed}.",
    )
    judge = found.judge or {}
    if truncated := judge.get("truncated"):
        print_line(
            console,
            f"Replies that were too long for the judge with their prompts, which lost their beginning: {truncated} "
            f"(it takes {judge['max_length']} tokens).",
        )
    if truncated := judge.get("truncated_replies"):
        print_line(
            console,
            f"Replies that were too long for the judge by themselves: {truncated}. It saw nothing of their prompts, "
            f"and only the end of each (it takes {judge['max_length']} tokens).",
        )


def _print_tally(tally: "Tally", names: list[str], judge: dict[str, Any], console: "Console") -> None:
    own, other = names
    print_line(console)
    if tally.identical == tally.pairs:
        print_line(
            console, f"Nothing was judged: all {tally.pairs} pairs are of identical replies, which tie."
        )
    elif tally.win_rate is None:
        print_line(
            console,
            f"No win rate: the judge gave no verdict on any of {tally.no_verdict} pairs it was asked about.",
        )
    else:
        how = "" if math.isnan(tally.win_rate.low) else "; in brackets the 95 % interval, prompts resampled"
        print_line(
            console,
            f"Win rate of {own} against {other}: {_estimate(tally.win_rate, 100, 1, ' %')} "
            f"({tally.won} won, {tally.lost} lost, {tally.tied} tied). Ties count one half{how}.",
        )
    print_line(console, f"Judge: {judge.get('judge', 'unknown')}. {_pairs(tally)}")
    if "requests" not in judge:
        return
    if tally.first_position is not None:
        print_line(
            console,
            f"Of {tally.asked} pairs asked in both orders {tally.inconsistent} changed with the order; "
            f"{tally.first_position:.0%} of the verdicts for one side were for the reply shown first.",
        )
    print_line(
        console,
        f"Requests: {judge['requests']}, of them retries: {judge['retried']}. Verdicts from the cache: "
        f"{judge['cached']}; not to be had: {judge['failed']}.",
    )


def _pairs(tally: "Tally") -> str:
    words = [f"{tally.pairs} pairs"]
    if tally.identical:
        words.append(f"{tally.identical} of identical replies, which tie without it")
    if tally.no_verdict:
        words.append(f"{tally.no_verdict} without a verdict, which are not in the win rate")
    return f"{'; '.join(words)}."


def _estimate(estimate: "Estimate", scale: float = 1, digits: int = 3, unit: str = "") -> str:
    value, low, high = (round(scale * part, digits) + 0.0 for part in estimate)
    if math.isnan(low):
        return f"{value:.{digits}f}{unit} (one prompt: no interval)"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{unit}"
