"""The benchmark of throughput runs, does the same work on all sides, and counts what it says it counts."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks import throughput
from benchmarks.throughput_peers import OURS, PEERS, PLAIN, PRECOMPUTED
from benchmarks.throughput_subject import Subject, build, pair_set, read_rows, reference_scores, useful_flops
from tests.tiny import pairs, write_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, pairs(200, 0))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def facts(data: Path, results: Path) -> dict[str, Any]:
    return throughput.main(["--quick", "--end-to-end", "--data", str(data), "--output", str(results)])


def test_all_trainers_do_the_same_work(facts: dict[str, Any]) -> None:
    assert [figures["pairs"] for figures in facts["configurations"]] == ["hh", "even-24", "even-96"]
    for figures in facts["configurations"]:
        assert figures["losses"]["first_agrees"]
        assert figures["losses"]["trajectory_agrees"]
        # The reference differs from the policy, or the first loss would be log 2 even on the wrong data.
        assert abs(figures["losses"]["first"] - 0.6931) > 1e-4
        assert len({peer["threads"] for peer in figures["peers"].values()}) == 1


def test_tokens_are_counted_as_they_enter_the_model(facts: dict[str, Any]) -> None:
    for figures in facts["configurations"]:
        peers = figures["peers"]
        rounds = figures["rounds"]
        assert all(len(peers[name]["policy_tokens"]) == rounds for name in PEERS)
        # Both of TRL's see the same padded batch; its reference pass sees it once more.
        assert peers[PLAIN]["policy_tokens"] == peers[PRECOMPUTED]["policy_tokens"]
        assert peers[PLAIN]["reference_tokens"] == peers[PLAIN]["policy_tokens"]
        assert [peers[name]["reference_passes"] for name in PEERS] == [
            [0] * rounds,
            [0] * rounds,
            [1] * rounds,
        ]
        for useful, ours in zip(figures["useful_tokens"], peers[OURS]["policy_tokens"], strict=True):
            assert ours >= useful


def test_even_pairs_have_nothing_to_save(facts: dict[str, Any]) -> None:
    figures = next(each for each in facts["configurations"] if each["pairs"] == "even-24")
    for useful, padded in zip(
        figures["useful_tokens"], figures["peers"][PRECOMPUTED]["policy_tokens"], strict=True
    ):
        # 2 pairs: 4 responses of 24 and 2 prompts of 2 to 4; padded: 4 rows of 24 and the longer prompt.
        assert 4 * 24 + 2 * 2 <= useful <= 4 * 24 + 2 * 4
        assert 4 * (24 + 2) <= padded <= 4 * (24 + 4)


def test_memory_and_whole_runs_are_measured(facts: dict[str, Any]) -> None:
    assert [row["peer"] for row in facts["memory"]] == list(PEERS)
    assert all(row["bytes"] > 0 for row in facts["memory"])
    cold = [("cold", peer) for peer in PEERS]
    warm = [("warm", peer) for peer in PEERS if peer != PLAIN]  # which keeps nothing
    assert [(row["caches"], row["peer"]) for row in facts["end_to_end"]] == cold + warm


def test_results_are_written_without_paths(facts: dict[str, Any], results: Path, data: Path) -> None:
    text, record = (results / "throughput.md").read_text(), (results / "throughput.json").read_text()
    assert json.loads(record)["configurations"] == facts["configurations"]
    for place in (data.parent, results, Path.home(), Path(throughput.__file__).parent):
        assert str(place) not in text + record


def test_scores_are_trls_and_scaled_pairs_have_their_length(data: Path, tmp_path: Path) -> None:
    human = read_rows(data)
    subject = Subject(hidden=32, intermediate=64, layers=1, heads=2, kv_heads=2, vocabulary=512)
    build(tmp_path, subject, [row["prompt"] + row["chosen"] for row in human], 600)
    usual = pair_set(tmp_path, "hh", human, subject, 4)
    scaled = pair_set(tmp_path, "length-1024", human, subject, 4)
    assert scaled.shapes == [tuple(2 * n for n in shape) for shape in usual.shapes]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert {row["response_ids"][0][-1] for row in scaled.tokens} == {tokenizer.eos_token_id}
    scores, _ = reference_scores(tmp_path, subject, usual.tokens)
    lengths = [chosen for _, chosen, _ in usual.shapes]
    # A random model finds every token about as unlikely as any other.
    for score, length in zip(scores["ref_chosen_logps"], lengths, strict=True):
        assert score / length == pytest.approx(-6.24, abs=0.3)  # log(1 / 512)


def test_useful_arithmetic() -> None:
    """One layer of width 2 with one head, intermediate 3, vocabulary 5; prompt of 2, responses of 1 and 3 tokens."""
    subject = Subject(hidden=2, intermediate=3, layers=1, heads=1, kv_heads=1, vocabulary=5)
    weights = 4 * 2 * 2 + 3 * 2 * 3  # q, k, v, o; gate, up, down
    attended = (1 + 2) + 3 + (3 + 4 + 5)
    forward = 2 * weights * 6 + 2 * 2 * 5 * 4 + 4 * 2 * attended
    assert useful_flops(subject, (2, 1, 3)) == 3 * forward
