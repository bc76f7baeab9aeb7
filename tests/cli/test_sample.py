"""`prefopt sample`: replies side by side, files, judges, refusals."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from prefopt_cli.cli.sample_report import print_samples
from prefopt_cli.evaluation.asking import Asked
from prefopt_cli.evaluation.generation import Drawing, Reply, Writer
from prefopt_cli.evaluation.judges.judging import Outcome, Ruling, Verdict, tally
from prefopt_cli.evaluation.side_by_side import Samples, Written
from prefopt_cli.models.policy import PolicySource
from tests.cli.conftest import Prefopt, environment
from tests.evaluation.judges.test_openai import KEY, Server, server, status, text  # noqa: F401
from tests.evaluation.judges.test_reward_model import build_reward_model
from tests.training.conftest import Run, make_recipe, run, shared_run  # noqa: F401

REFUSED = "the judge's server refuses it"
FEW = ("--limit", "3", "--max-new-tokens", "8")


@pytest.fixture
def place(shared_run: Run) -> Path:  # noqa: F811
    """A run that trained so hard, the head of the model too, that every reply is another."""
    path: Path = shared_run("hard", "training.max_steps=6", "training.learning_rate=0.1").run.path
    return path


def made_up() -> Samples:
    asked = Asked(
        "a test", 9, ("tea?\nNow.", [{"role": "user", "content": "snow?"}]), ((), ()), ((2,), (2,)), 8, {}
    )
    source = PolicySource("model")
    names = ("runs/with-a-name-that-is-rather-long/kind", "reference")
    replies = [[[Reply(" With pleasure.", 4, True)], [Reply("\nNo\n", 8, False)]] for _ in names]
    written = [
        Written(Writer(name, source, None), each)  # type: ignore[arg-type]
        for name, each in zip(names, replies, strict=True)
    ]
    rulings = [
        [Ruling(Outcome.TIED, Verdict.FIRST, Verdict.FIRST)],
        [Ruling(Outcome.NO_VERDICT, reason=REFUSED)],
    ]
    judge = {"judge": "openai:m", "requests": 6, "retried": 2, "cached": 1, "failed": 2}
    counted = tally([each for (each,) in rulings], [0, 1])
    return Samples(asked, Drawing(), written, rulings, counted, judge)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_printed(encoding: str, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding=encoding) as file:
        print_samples(made_up(), Console(file=file, width=100, highlight=False), tmp_path)
    lines = (tmp_path / "out").read_text(encoding).splitlines()

    assert lines[:5] == [
        "prompt     tea?",
        "           Now.",
        "kind       With pleasure.",
        "reference  With pleasure.",
        "verdict    tie: the verdict changed with the order of the replies",
    ]
    assert "prompt     user: snow?" in lines
    assert "           [cut off after 8 tokens]" in lines
    assert "verdict    none: the judge's server refuses it" in lines
    whole = " ".join(lines)
    assert "Win rate of kind against reference: 50.0 % (one prompt: no interval) (0 won" in whole
    assert "1 without a verdict, which are not in the win rate" in whole
    assert "Of 1 pairs asked in both orders 1 changed with the order; 100% of the verdicts" in whole
    assert "Requests: 6, of them retries: 2. Verdicts from the cache: 1; not to be had: 2." in whole


def test_on_a_terminal_text_stays_in_its_column() -> None:
    file = io.StringIO()
    found = made_up()
    found.written[0].replies[0][0] = Reply("many words " * 20, 40, True)
    print_samples(found, Console(file=file, width=60, force_terminal=True, highlight=False), None)

    lines = [line for line in file.getvalue().splitlines() if "many" in line]
    assert len(lines) > 3
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 11) for line in lines[1:])


def test_a_reply_does_not_steer_the_terminal() -> None:
    file = io.StringIO()
    found = made_up()
    found.written[0].replies[0][0] = Reply("red \x1b[31m and \x07 [bold]more[/bold]", 4, True)
    print_samples(found, Console(file=file, width=100, highlight=False), None)
    assert (
        "red \N{REPLACEMENT CHARACTER}[31m and \N{REPLACEMENT CHARACTER} [bold]more[/bold]" in file.getvalue()
    )


def test_a_run_replies_to_its_held_out_prompts(prefopt: Prefopt, place: Path) -> None:
    result = prefopt("sample", str(place), *FEW)
    assert result.code == 0, result.err
    assert "Prompts: 3 of 24 from the held-out set heldout." in result.out
    assert result.out.splitlines()[-1] == f"Files: {place}/eval/samples"
    records = [json.loads(line) for line in (place / "eval/samples/samples.jsonl").read_text().splitlines()]
    assert [each["prompt_number"] for each in records] == [0, 1, 2]
    assert all(each["tokens"] <= 8 for each in records)

    result = prefopt("sample", str(place), *FEW, "--json", "--batch-size", "1")
    told = json.loads(result.out)
    assert told["samples"] == records
    summary = json.loads((place / "eval/samples/summary.json").read_text())
    assert summary == {name: value for name, value in told.items() if name != "samples"}
    assert summary["policies"][0]["run_id"]
    assert summary["verdicts"] is summary["judge"] is None


def test_beside_what_it_began_with(prefopt: Prefopt, place: Path, tiny_world: Path) -> None:
    told = json.loads(prefopt("sample", str(place), "--against", "reference", *FEW, "--json").out)
    base = json.loads(
        prefopt(
            "sample",
            str(tiny_world / "model"),
            "--prompts",
            str(tiny_world / "heldout.jsonl"),
            *FEW,
            "--json",
        ).out
    )
    replies = {
        name: [each["reply"] for each in told["samples"] if each["policy"] == name]
        for name in (str(place), "reference")
    }
    assert replies["reference"] == [each["reply"] for each in base["samples"]] != replies[str(place)]


def test_against_itself_a_reward_model_finds_exactly_one_half(
    prefopt: Prefopt, place: Path, tmp_path: Path
) -> None:
    judge = f"reward-model:{build_reward_model(tmp_path / 'reward')}"
    told = json.loads(
        prefopt(
            "sample",
            str(place),
            "--against",
            str(place),
            "--judge",
            judge,
            "--per-prompt",
            "2",
            *FEW,
            "--json",
        ).out
    )
    assert told["verdicts"]["win_rate"]["value"] == 0.5
    assert told["verdicts"]["win_rate"]["low"] is None  # nothing was judged
    assert told["verdicts"]["tied"] == told["verdicts"]["identical"] == 6

    there = json.loads(
        prefopt("sample", str(place), "--against", "reference", "--judge", judge, *FEW, "--json").out
    )
    assert there["verdicts"]["inconsistent"] == 0
    assert "first_position" not in there["verdicts"]
    for own, other in zip(there["samples"][::2], there["samples"][1::2], strict=True):
        higher = "won" if own["score"] > other["score"] else "lost"
        assert own["ruling"]["outcome"] == higher
    result = prefopt("sample", str(place), "--judge", judge, *FEW)
    assert "mean [95 %]" in result.out
    assert "Win rate" not in result.out
    same = prefopt("sample", str(place), "--against", str(place), "--judge", judge, *FEW)
    assert "Nothing was judged: all 3 pairs are of identical replies" in same.out
    one = prefopt("sample", str(place), "--judge", judge, "--limit", "1", "--max-new-tokens", "8")
    assert "(one prompt: no interval)" in one.out


def test_a_judge_behind_a_server(
    prefopt: Prefopt,
    place: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked = ("--against", "reference", "--judge", "openai:m", "--judge-url", server.url)
    output = ("--output", str(tmp_path / "out"))
    result = prefopt("sample", str(place), *FEW, *asked, *output)
    assert result.code == 0, result.err
    assert "Requests: 7, of them retries: 0." in result.out  # one of them to try it out
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert KEY not in result.out + result.err + written

    again = prefopt("sample", str(place), *FEW, *asked, *output)
    assert len(server.asked) == 8
    assert "Requests: 1, of them retries: 0. Verdicts from the cache: 6;" in again.out

    server.script, server.usual = [text("Verdict: A")], status(503)
    gone = prefopt("sample", str(place), *FEW, *asked, *output, "--seed", "1", "--judge-retries", "0")
    assert gone.code == 1
    assert "0 of 6 verdicts are in the cache; the same command goes on from there." in gone.err
    assert f"The replies are in {tmp_path / 'out'}, without verdicts." in gone.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["judging"], summary["judge"], summary["drawing"]["seed"]) == ("unfinished", None, 1)
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(("code", "exit_code"), [(401, 2), (404, 2), (503, 1)])
def test_a_judge_that_cannot_judge_is_found_out_before_anything_is_drawn(
    prefopt: Prefopt,
    place: Path,
    server: Server,  # noqa: F811
    tmp_path: Path,
    code: int,
    exit_code: int,
) -> None:
    server.usual = status(code)
    asked = ("--against", "reference", "--judge", "openai:m", "--judge-url", server.url)
    options = ("--judge-retries", "0", "--output", str(tmp_path / "out"))
    result = prefopt("sample", str(place), *FEW, *asked, *options)
    assert result.code == exit_code
    assert len(server.asked) == 1
    assert "sampling" not in result.err
    assert not (tmp_path / "out").exists()


def test_replies_without_a_folder_are_shown_where_the_judge_fails(
    prefopt: Prefopt,
    tiny_world: Path,
    place: Path,
    server: Server,  # noqa: F811
) -> None:
    server.script, server.usual = [text("Verdict: A")], status(401)
    asked = ("--against", str(place), "--judge", "openai:m", "--judge-url", server.url)
    result = prefopt("sample", str(tiny_world / "model"), "--prompts", "tea?", *FEW, *asked, "--json")
    assert result.code == 2
    told = json.loads(result.out)
    assert told["judging"] == "unfinished"
    assert len(told["samples"]) == 2


def test_no_verdict_at_all_is_a_failure_with_its_results(
    prefopt: Prefopt,
    place: Path,
    server: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    server.script, server.usual = [text("Verdict: A")], status(422, "filtered")
    asked = ("--against", "reference", "--judge", "openai:m", "--judge-url", server.url)
    result = prefopt("sample", str(place), *FEW, *asked, "--output", str(tmp_path / "out"))
    assert result.code == 1
    assert (
        "no verdict on any of 3 pairs: the judge's server refuses it (HTTP status 422): filtered"
        in result.err
    )
    assert "No win rate" in result.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["judging"], summary["verdicts"]["no_verdict"]) == ("finished", 3)


def test_files_that_cannot_be_written_lose_no_results(
    prefopt: Prefopt, tiny_world: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "samples.jsonl").mkdir(parents=True)
    output = ("--output", str(tmp_path / "out"))
    result = prefopt("sample", str(tiny_world / "model"), "--prompts", "tea?", *FEW, *output)
    assert result.code == 1
    assert "prompt  tea?" in " ".join(result.out.split("\n")).replace("   ", "  ")
    assert "The samples cannot be written to" in result.err
    assert "Files:" not in result.out
    assert "Unexpected" not in result.err


def test_a_rubric_of_the_users(
    prefopt: Prefopt,
    place: Path,
    server: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "rubric.txt").write_text("My own: {prompt} {a} {b}")
    server.usual = text("Verdict: B")
    asked = ("--against", "reference", "--judge", "openai:m", "--judge-url", server.url)
    told = json.loads(
        prefopt(
            "sample", str(place), *FEW, *asked, "--judge-prompt", str(tmp_path / "rubric.txt"), "--json"
        ).out
    )
    assert all(each["messages"][0]["content"].startswith("My own: <<<begin") for each in server.asked)
    assert told["verdicts"]["first_position"] == 0.0
    assert told["verdicts"]["win_rate"]["value"] == 0.5


def test_models_leave_files_only_where_they_are_told_to(
    prefopt: Prefopt, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny_world / "model")
    result = prefopt("sample", model, "--prompts", "tea?", *FEW)
    assert result.code == 0, result.err
    assert "Files:" not in result.out
    assert list(tmp_path.iterdir()) == []
    result = prefopt("sample", model, "--prompts", "tea?", *FEW, "--output", "out")
    assert "Files: out" in result.out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"samples.jsonl", "summary.json"}


def test_texts_are_messages_where_the_run_was_trained_on_them(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"tea {number}?"}],
            "chosen": [{"role": "assistant", "content": f"Yes {number}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for number in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("chats", "training.max_steps=1", f"dataset.train={tmp_path}/chats.jsonl", "dataset.eval={}")
    place = str(tmp_path / "chats")

    told = json.loads(prefopt("sample", place, "--prompts", "tea?", *FEW, "--json").out)
    assert told["samples"][0]["prompt"] == [{"role": "user", "content": "tea?"}]
    told = json.loads(prefopt("sample", place, "--prompts", "tea?", "--no-chat", *FEW, "--json").out)
    assert told["samples"][0]["prompt"] == "tea?"
    result = prefopt("sample", place, *FEW)
    assert result.code == 2
    assert "has no held-out prompts to ask. Name some: --prompts" in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--judge", "me"), "--judge me: write reward-model:PATH_OR_ID"),
        (("--judge", "openai:m"), "name its server with --judge-url"),
        (
            ("--judge", "reward-model:x", "--judge-url", "http://h/v1"),
            "--judge-url is for --judge openai:MODEL",
        ),
        (("--judge-prompt", "f"), "--judge-prompt is for --judge openai:MODEL"),
        (("--judge-concurrency", "4"), "--judge-concurrency is for --judge openai:MODEL"),
        (("--judge-rpm", "4"), "--judge-rpm is for --judge openai:MODEL"),
        (("--judge-timeout", "4"), "--judge-timeout is for --judge openai:MODEL"),
        (
            ("--judge", "reward-model:x", "--judge-retries", "5"),
            "--judge-retries is for --judge openai:MODEL",
        ),
        (("--judge-timeout", "inf"), "--judge-timeout"),
        (("--judge", "openai:m", "--judge-url", "http://h", "--judge-timeout", "nan"), "--judge-timeout"),
        (("--judge", "openai:m\udcff", "--judge-url", "http://h"), "not UTF-8"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--temperature", "nan"), "--temperature"),
        (("--split", "test"), "--split is of a data set"),
        (("--prompts", "sandbox:polite", "--chat"), "--chat is for prompts from the command line"),
        (("--judge", "openai:m", "--judge-url", "http://h/v1"), "compares replies of two policies"),
        (("--judge", "reward-model:./none"), "there is no folder ./none"),
        (("--top-p", "0"), "--top-p 0"),
        (("--temperature", "0", "--per-prompt", "2"), "at temperature 0"),
        (("--prompts", "no/such/file"), "there is no file no/such/file"),
        (("--against", "reference"), "is a model, not a run"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(
    prefopt: Prefopt, tiny_world: Path, arguments: tuple[str, ...], said: str
) -> None:
    asked = arguments if "--prompts" in arguments else ("--prompts", "tea?", *arguments)
    result = prefopt("sample", str(tiny_world / "model"), *asked)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err


def test_options_of_prompts_have_no_meaning_for_held_out_sets(prefopt: Prefopt, place: Path) -> None:
    for arguments, said in ((("--no-chat",), "the run's held-out sets"), (("--split", "test"), "--prompts")):
        result = prefopt("sample", str(place), *FEW, *arguments)
        assert result.code == 2
        assert said in result.err


def test_several_processes_are_refused(prefopt: Prefopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = prefopt("sample", "any", *FEW)
    assert result.code == 2
    assert "prefopt sample runs in one process" in result.err


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_wait_for_a_server(
    prefopt: Prefopt,
    place: Path,
    server: Server,  # noqa: F811
) -> None:
    over = threading.Event()
    server.script, server.usual = [text("Verdict: A")], lambda handler: (over.wait(100), None)[1]
    command = (
        *("sample", str(place), "--against", "reference", *FEW),
        *("--judge", "openai:m", "--judge-url", server.url, "--judge-timeout", "600"),
    )
    begun = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", *command], stderr=subprocess.PIPE, env=environment(), text=True
    )
    deadline = time.monotonic() + 120
    while len(server.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=60)
    over.set()

    assert begun.returncode == 130
    assert "The replies are in" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_keeps_the_verdicts(
    prefopt: Prefopt,
    place: Path,
    server: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    server.usual = lambda handler: (time.sleep(0.3), handler.verdict("A"))[1]
    command = (
        *("sample", str(place), "--against", "reference", "--limit", "24", "--max-new-tokens", "8"),
        *("--judge", "openai:m", "--judge-url", server.url, "--judge-concurrency", "1"),
        *("--output", str(tmp_path / "out")),
    )
    begun = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", *command], stderr=subprocess.PIPE, env=environment(), text=True
    )
    deadline = time.monotonic() + 120
    while len(server.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=60)

    assert begun.returncode == 130
    assert "Stopped. Verdicts of a server are in the cache" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["judging"] == "unfinished"
    asked = len(server.asked)
    assert asked < 48
    server.usual = text("Verdict: A")
    result = prefopt(*command)
    assert result.code == 0, result.err
    assert len(server.asked) == 48 + 2  # either command has tried it out
