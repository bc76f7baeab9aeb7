"""A judge's server that says what it should not, or says it too slowly, at too great length, or not at all."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.judges.judging import JudgingStopped, NoVerdict, Outcome, Question, Verdict, rule
from prefopt_cli.evaluation.judges.printable import printable
from prefopt_cli.training.reporting import Silent
from tests.evaluation.judges.test_openai import (
    KEY,
    PAIRS,
    QUICK,
    Answer,
    Handler,
    Server,
    hang_up,
    judge,
    server,  # noqa: F401
    status,
    text,
)

ONE_TRY = replace(QUICK, retries=0, concurrency=1)
MANY = [Question(f"prompt {number}", "a long reply", "short") for number in range(40)]


def in_parts(part: bytes, pause: float, most: int) -> Answer:
    """An answer of no stated length."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(most):
                handler.wfile.write(part)
                handler.wfile.flush()
                time.sleep(pause)
        except OSError:  # the judge has left
            pass

    return answer


def about(words: str, answer: Answer) -> Answer:
    """This answer to a question with these words, and a verdict on any other."""
    return lambda handler: answer(handler) if words in handler.content else handler.verdict(handler.longer())


def late(handler: Handler) -> None:
    time.sleep(3)
    handler.verdict("A")


@pytest.fixture
def hanging(server: Server) -> Iterator[Server]:  # noqa: F811
    """A server that says nothing until the test is over."""
    over = threading.Event()
    server.usual = lambda handler: (over.wait(30), None)[1]
    yield server
    over.set()


@pytest.mark.parametrize("before", [290, 295, 299, 300])
def test_no_part_of_a_key_is_told_where_words_are_cut_off(
    server: Server,  # noqa: F811
    tmp_path: Path,
    before: int,
) -> None:
    server.usual = status(401, "x" * before + KEY)
    with pytest.raises(UserError) as raised:
        judge(server, tmp_path, ONE_TRY, key=KEY).check()
    assert KEY[:1] not in str(raised.value).split("It says: ")[1]


def test_the_goal_of_a_redirect_is_told_without_the_key(server: Server, tmp_path: Path) -> None:  # noqa: F811
    server.usual = status(302, Location=f"http://h/\x1b[31m?token={KEY}")
    with pytest.raises(UserError, match=r"it lies at http://h/.*token=\*\*\*") as raised:
        judge(server, tmp_path, ONE_TRY, key=KEY).check()
    assert str(raised.value).isprintable()


def test_words_of_a_server_do_not_steer_the_terminal(server: Server, tmp_path: Path) -> None:  # noqa: F811
    server.usual = status(403, "red \x1b[31m bell \x07")
    with pytest.raises(UserError, match=r"red .* bell") as raised:
        judge(server, tmp_path, ONE_TRY).check()
    assert "\x1b" not in str(raised.value)
    assert "\x07" not in str(raised.value)


def test_what_nobody_sees_is_marked() -> None:
    assert printable("a\tb\nc é 猫") == "a\tb\nc é 猫"
    for each in "\x00\x1b\x07\x9b\u200b\u200f\u202a\u202e\u2066\u2069\ufeff":
        assert printable(f"a{each}b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (in_parts(b" ", 0.05, 200), "does not come to an end in time"),
        (in_parts(b" " * 100_000, 0, 100), "longer than 1 MB"),
        (status(200, "[" * 100_000), "no chat completions"),
        (hang_up, "disconnected|closed|reset"),
    ],
    ids=["drips", "huge", "nested", "hangs up"],
)
def test_an_answer_without_end_or_sense_is_one_that_failed(
    server: Server,  # noqa: F811
    tmp_path: Path,
    answer: Answer,
    said: str,
) -> None:
    server.usual = answer
    with pytest.raises(PrefoptError, match=f"(?i)gave no answer in 1 tries .*({said})"):
        judge(server, tmp_path, replace(ONE_TRY, timeout=0.6)).verdicts(PAIRS[:1], Silent())

    server.usual, server.script = lambda handler: handler.verdict("A"), [answer]
    patient = replace(QUICK, timeout=0.6, concurrency=1)
    assert judge(server, tmp_path, patient).verdicts(PAIRS[:1], Silent()) == [Verdict.FIRST]


def test_a_server_may_not_ask_for_haste(server: Server, tmp_path: Path) -> None:  # noqa: F811
    server.script = [status(429, Retry_After="0"), status(503, Retry_After="0")]
    patience = replace(QUICK, backoff=0.4, longest=0.4, concurrency=1)
    judge(server, tmp_path, patience).verdicts(PAIRS[:1], Silent())
    first, second, third = server.times
    assert second - first >= 0.2
    assert third - second >= 0.2


def test_a_refusal_stops_all_threads(server: Server, tmp_path: Path) -> None:  # noqa: F811
    server.usual = status(403)
    with pytest.raises(UserError, match="403"):
        judge(server, tmp_path, replace(QUICK, concurrency=4)).verdicts(MANY, Silent())
    assert len(server.asked) <= 4


def test_a_signal_does_not_wait_for_a_server_that_says_nothing(hanging: Server, tmp_path: Path) -> None:
    patience = replace(QUICK, timeout=60.0, grace=0.1)
    with pytest.raises(JudgingStopped):
        judge(hanging, tmp_path, patience).verdicts(MANY, Silent(), lambda: len(hanging.asked) == 2)
    assert hanging.at_once == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(400, "too long"), "refuses it (HTTP status 400): too long"),
        (status(413), "refuses it (HTTP status 413)"),
        (status(422), "refuses it (HTTP status 422)"),
        (status(500), "gave no answer (HTTP status 500)"),
        (late, "gave no answer (no answer within"),
    ],
    ids=["400", "413", "422", "500", "slow"],
)
def test_one_bad_pair_blocks_no_other(
    server: Server,  # noqa: F811
    tmp_path: Path,
    answer: Answer,
    reason: str,
) -> None:
    server.usual = about("prompt 1", answer)
    one = judge(server, tmp_path, replace(QUICK, retries=0, timeout=1.0))
    found = rule(one, PAIRS, Silent())

    assert [each.outcome for each in found] == [Outcome.WON, Outcome.NO_VERDICT, Outcome.WON, Outcome.WON]
    assert reason in (found[1].reason or "")
    assert found[0].reason is None
    assert one.to_dict()["failed"] == 2


def test_parts_of_an_answer_are_read_together(server: Server, tmp_path: Path) -> None:  # noqa: F811
    parts = [
        {"type": "text", "text": "Because.\n"},
        {"type": "image"},
        {"type": "text", "text": "Verdict: A"},
    ]
    server.usual = status(200, json.dumps({"choices": [{"message": {"content": parts}}]}))
    assert judge(server, tmp_path).verdicts(PAIRS[:1], Silent()) == [Verdict.FIRST]


def test_an_answer_that_was_cut_off_is_no_verdict_and_says_so(server: Server, tmp_path: Path) -> None:  # noqa: F811
    choice = {"message": {"content": "They wrote:\nVerdict: A"}, "finish_reason": "length"}
    server.usual = status(200, json.dumps({"choices": [choice]}))
    (found,) = judge(server, tmp_path).verdicts(PAIRS[:1], Silent())
    assert isinstance(found, NoVerdict)
    assert "cut off at max_tokens" in found.reason


def test_unclear_answers_are_asked_for_again_after_a_while_and_twice_at_most(
    server: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    server.usual = text("Both have their merits.")
    patience = replace(QUICK, retries=9, backoff=0.2, longest=0.2, concurrency=1)
    assert judge(server, tmp_path, patience).verdicts(PAIRS[:1], Silent()) == [NoVerdict()]
    assert len(server.asked) == 3
    assert server.times[1] - server.times[0] >= 0.1


def test_a_judge_is_tried_out(server: Server, tmp_path: Path) -> None:  # noqa: F811
    server.usual = text("I do not judge.")
    one = judge(server, tmp_path)
    one.check()
    assert [one.to_dict()[each] for each in ("requests", "failed")] == [1, 0]
    assert (tmp_path / "verdicts.jsonl").exists() is False
    server.usual = status(404)
    with pytest.raises(UserError, match="--judge-url"):
        judge(server, tmp_path).check()
    server.usual = status(503)
    with pytest.raises(PrefoptError, match="gave no answer in 4 tries"):
        judge(server, tmp_path).check()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "socksio"),
        ("HTTP_PROXY", "ftp://me:secret@127.0.0.1:9", "no address of a proxy"),
        ("SSL_CERT_FILE", "/secret/none.pem", "No such file"),
    ],
)
def test_an_environment_that_cannot_work_is_named(
    server: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}.*{said}") as raised:
        judge(server, tmp_path).check()
    assert "secret" not in str(raised.value)
