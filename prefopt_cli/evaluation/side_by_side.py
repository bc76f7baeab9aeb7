"""Replies of one policy, or of two side by side, with what a judge says about them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.asking import Asked, Prompts, choose
from prefopt_cli.evaluation.generation import Drawing, Reply, SamplingStopped, Writer, draw
from prefopt_cli.evaluation.judges.judging import Judge, Question, Ruling, Tally, across, as_json, rule, tally
from prefopt_cli.evaluation.judges.reward_model import RewardModelJudge
from prefopt_cli.evaluation.statistics import LEVEL, Estimate, mean_with_interval
from prefopt_cli.runs import atomic
from prefopt_cli.training.reporting import Reporter

SAMPLES, SUMMARY = "samples.jsonl", "summary.json"

NO_JUDGE, UNFINISHED, FINISHED = "none", "unfinished", "finished"
"""How far the judging is."""


@dataclass(frozen=True)
class Written:
    """One policy's replies."""

    writer: Writer
    replies: list[list[Reply]]
    """By prompt."""
    scores: list[list[float]] | None = None
    """Of the replies, where a reward model judges."""

    @property
    def all(self) -> list[Reply]:
        """Of all prompts."""
        return [reply for each in self.replies for reply in each]

    @property
    def tokens(self) -> float:
        """Mean length of a reply."""
        return sum(reply.tokens for reply in self.all) / len(self.all)

    @property
    def cut_off(self) -> int:
        """Replies that did not end by themselves."""
        return sum(not reply.finished for reply in self.all)

    def score(self, seed: int) -> Estimate | None:
        """Mean of the scores; the interval resamples prompts."""
        if self.scores is None:
            return None
        clusters = [place for place, each in enumerate(self.scores) for _ in each]
        values = [score for each in self.scores for score in each]
        return across(mean_with_interval(values, clusters, seed=seed), clusters)


@dataclass(frozen=True)
class Samples:
    """What `prefopt sample` has found."""

    asked: Asked
    drawing: Drawing
    written: list[Written]
    """The policy's own first, then that of the other one, if there is one."""
    rulings: list[list[Ruling]] | None = None
    """By prompt, on each pair of replies."""
    tally: Tally | None = None
    judge: dict[str, Any] | None = None
    judging: str = NO_JUDGE

    @property
    def first_reason(self) -> str | None:
        """Why the first pair without a verdict has none."""
        flat = (ruling for each in self.rulings or [] for ruling in each)
        return next((ruling.reason for ruling in flat if ruling.reason), None)

    def summary(self) -> dict[str, Any]:
        """For JSON, without the replies."""
        drawing = asdict(self.drawing)
        del drawing["batch_size"]
        return {
            "level": LEVEL,
            "prompts": {
                "from": self.asked.origin,
                "asked": len(self.asked.texts),
                "distinct": self.asked.distinct,
                "left_out": self.asked.left_out,
            },
            "drawing": {**drawing, "max_new_tokens": self.asked.max_new_tokens},
            "policies": [self._policy(each) for each in self.written],
            "judging": self.judging,
            "judge": self.judge,
            "verdicts": self.tally.to_dict() if self.tally else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON, replies and all."""
        return {**self.summary(), "samples": list(self.records())}

    def records(self) -> Iterator[dict[str, Any]]:
        """One for every reply, prompt by prompt."""
        for place, prompt in enumerate(self.asked.texts):
            for number in range(self.drawing.per_prompt):
                for part, each in enumerate(self.written):
                    reply = each.replies[place][number]
                    record: dict[str, Any] = {
                        "prompt_number": place,
                        "prompt": prompt,
                        "policy": each.writer.name,
                        "number": number,
                        "reply": reply.text,
                        "tokens": reply.tokens,
                        "finished": reply.finished,
                    }
                    if each.scores is not None:
                        record["score"] = each.scores[place][number]
                    if self.rulings is not None and part == 0:
                        record["ruling"] = self.rulings[place][number].to_dict()
                    yield record

    def write(self, folder: Path) -> None:
        """Write `samples.jsonl` and `summary.json`, each at once.

        Raises:
            PrefoptError: they cannot be written; earlier files are still there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json_lines(folder / SAMPLES, self.records())
            atomic.write_json(folder / SUMMARY, self.summary())
        except OSError as error:
            raise PrefoptError(
                f"The samples cannot be written to {folder}: {error.strerror or error}. Make room there, or name "
                "another folder with --output."
            ) from error

    def _policy(self, written: Written) -> dict[str, Any]:
        score = written.score(self.drawing.seed)
        return {
            **written.writer.to_dict(),
            "replies": len(written.all),
            "tokens": written.tokens,
            "cut_off": written.cut_off,
            **({"score": as_json(score)} if score else {}),
        }


def require_judgeable(judge: Judge | None, writers: Sequence[Writer]) -> None:
    """Raise UserError where a judge that compares has nothing to compare."""
    if judge is not None and len(writers) == 1 and not isinstance(judge, RewardModelJudge):
        raise UserError(
            "--judge: this judge compares replies of two policies. Name the other one: --against reference, or a run."
        )


def side_by_side(
    writers: Sequence[Writer],
    prompts: Prompts,
    drawing: Drawing,
    *,
    limit: int,
    max_new_tokens: int | None,
    judge: Judge | None,
    reporter: Reporter,
    stopping: Callable[[], bool] = lambda: False,
    keep: Callable[[Samples], None] = lambda _: None,
) -> Samples:
    """Have the policies reply, one after the other, and the replies judged.

    Args:
        writers: one policy, or two.
        prompts: to choose from.
        drawing: how replies are drawn.
        limit: prompts that are asked.
        max_new_tokens: of a reply; None for the usual.
        judge: who judges the replies, if anyone does.
        reporter: told of progress.
        stopping: whether a signal has asked to stop.
        keep: gets the replies before they are judged, as a judge may fail.

    Raises:
        UserError: no prompt can be asked, or a model cannot be loaded.
        PrefoptError: the judge fails.
        SamplingStopped: a signal came while replies were drawn.
        JudgingStopped: a signal came while they were judged.
    """
    require_judgeable(judge, writers)
    drawing.require_different_replies()
    asked = choose(prompts, limit, [writer.reader for writer in writers], max_new_tokens, reporter)
    written = []
    for writer, ids, stop_ids in zip(writers, asked.ids, asked.stop_ids, strict=True):
        if stopping():
            raise SamplingStopped
        replies = draw(
            writer,
            asked.texts,
            ids,
            drawing,
            max_new_tokens=asked.max_new_tokens,
            stop_ids=stop_ids,
            reporter=reporter,
            stopping=stopping,
        )
        written.append(Written(writer, replies))
    found = Samples(asked, drawing, written)
    if judge is None:
        return found
    keep(replace(found, judging=UNFINISHED))
    return _judged(found, judge, reporter, stopping)


def _judged(found: Samples, judge: Judge, reporter: Reporter, stopping: Callable[[], bool]) -> Samples:
    """The same with scores, rulings and their tally, as far as the judge gives them."""
    asked, written = found.asked, found.written
    is_pointwise = isinstance(judge, RewardModelJudge)
    if isinstance(judge, RewardModelJudge):
        written = _scored(judge, asked, written, reporter, stopping)
    rulings, counted = None, None
    if len(written) > 1:
        rulings = _ruled(judge, asked, written, reporter, stopping)
        clusters = [place for place, each in enumerate(rulings) for _ in each]
        flat = [ruling for each in rulings for ruling in each]
        counted = tally(flat, clusters, seed=found.drawing.seed, sees_order=not is_pointwise)
    return Samples(asked, found.drawing, written, rulings, counted, judge.to_dict(), FINISHED)


def _scored(
    judge: RewardModelJudge,
    asked: Asked,
    written: Sequence[Written],
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> list[Written]:
    """The same replies with their scores."""
    flat = [
        (prompt, reply.text)
        for each in written
        for prompt, replies in zip(asked.texts, each.replies, strict=True)
        for reply in replies
    ]
    scores = iter(judge.scores(flat, reporter, stopping))
    return [
        Written(each.writer, each.replies, [[next(scores) for _ in replies] for replies in each.replies])
        for each in written
    ]


def _ruled(
    judge: Judge,
    asked: Asked,
    written: Sequence[Written],
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> list[list[Ruling]]:
    """By prompt, a ruling on each pair of replies with the same number."""
    own, other = written
    pairs = [
        Question(prompt, first.text, second.text)
        for prompt, firsts, seconds in zip(asked.texts, own.replies, other.replies, strict=True)
        for first, second in zip(firsts, seconds, strict=True)
    ]
    found = iter(rule(judge, pairs, reporter, stopping))
    return [[next(found) for _ in replies] for replies in own.replies]
