"""Real preference data through a real tokenizer: every row accounted for, and the same ids as TRL's."""

import itertools
import json
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefopt_cli import data
from prefopt_cli.data.examples import PreferenceData
from prefopt_cli.recipe.schema import DatasetSettings, Source

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def stories(shared: Path) -> str:
    return str(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def tokenizer(stories: str) -> Any:
    return AutoTokenizer.from_pretrained(stories)


def _settings(shared: Path, name: str, **others: Any) -> DatasetSettings:
    train = {"source": str(shared / "data" / f"{name}.jsonl.gz"), **others.pop("source", {})}
    return DatasetSettings.model_validate({"train": train, "max_length": 512, "shuffle": False, **others})


def _tokenize(settings: DatasetSettings, tokenizer: Any) -> tuple[PreferenceData, data.TokenizedData]:
    loaded = data.load(settings)
    tokens = data.tokenize(loaded, tokenizer, settings)
    tokens.receipt.check()
    return loaded, tokens


def test_every_hh_row_is_accounted_for(shared: Path, tokenizer: Any) -> None:
    started = time.perf_counter()
    _, tokens = _tokenize(_settings(shared, "hh_helpful_harmless"), tokenizer)
    assert time.perf_counter() - started < 30  # a few seconds on one core; far more means one call per row
    record = tokens.receipt.sets["train"].sources[0]
    assert (record.format, record.read, record.kept) == ("standard", 4642, 3001)
    assert record.dropped == {"prompt too long": 899, "response too long": 742}
    for one in tokens.train:
        assert one["prompt_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in one["prompt_ids"][1:]
        for side in one["response_ids"]:
            assert side.count(tokenizer.eos_token_id) == 1
            assert side[-1] == tokenizer.eos_token_id
            assert len(one["prompt_ids"]) + len(side) <= 512


def test_every_hh_chat_is_accounted_for(shared: Path, tokenizer: Any) -> None:
    _, tokens = _tokenize(_settings(shared, "hh_helpful_harmless_chat"), tokenizer)
    record = tokens.receipt.sets["train"].sources[0]
    assert (record.format, record.read, record.kept) == ("conversational", 4632, 3022)
    assert record.changed == {}
    for one in tokens.train:
        assert one["prompt_ids"].count(tokenizer.bos_token_id) == 1
        assert [side[-1] for side in one["response_ids"]] == [tokenizer.eos_token_id] * 2
    assert "chat template writes it" in (tokens.receipt.special_tokens or {})["verdict"]


def test_truncation_keeps_what_dropping_loses(shared: Path, tokenizer: Any) -> None:
    _, tokens = _tokenize(
        _settings(shared, "hh_helpful_harmless", on_overflow="truncate_response"), tokenizer
    )
    record = tokens.receipt.sets["train"].sources[0]
    cut = record.changed["response truncated"] + record.dropped["identical in tokens"]
    assert (record.dropped["prompt too long"], cut) == (899, 742)


def test_pandalm_and_its_duplicates(shared: Path, tokenizer: Any) -> None:
    loaded, tokens = _tokenize(_settings(shared, "pandalm_pairs_chat", max_length=None), tokenizer)
    assert len(loaded.train) == len(tokens.train) == 762
    assert tokens.receipt.sets["train"].sources[0].dropped == {"duplicate": 80}


LISTS: dict[tuple[str, int | None], tuple[int, dict[str, int], dict[str, int], int, list[int], int, int]] = {
    # kept, dropped, changed, responses, sizes of the lists, all pairs, adjacent pairs
    ("pandalm_ranked", None): (
        148,
        {"all responses tied": 6},
        {"repeated response left out": 34, "empty response left out": 2},
        647,
        [2, 5],
        917,
        551,
    ),
    ("pandalm_ranked", 512): (
        138,
        {"all responses tied": 6, "response too long": 10},
        {
            "repeated response left out": 31,
            "empty response left out": 2,
            "overlong response left out of its list": 19,
        },
        579,
        [2, 5],
        795,
        474,
    ),
    ("qa_feedback_ranked", None): (488, {"all responses tied": 12}, {}, 1952, [4, 4], 2670, 1504),
    ("qa_feedback_ranked", 512): (
        480,
        {"all responses tied": 12, "response too long": 8},
        {"overlong response left out of its list": 57},
        1851,
        [2, 4],
        2444,
        1407,
    ),
}


@pytest.mark.parametrize(("name", "max_length"), LISTS)
def test_every_list_is_accounted_for(name: str, max_length: int | None, shared: Path, tokenizer: Any) -> None:
    kept, dropped, changed, responses, sizes, all_pairs, adjacent_pairs = LISTS[name, max_length]
    settings = _settings(shared, name, max_length=max_length)
    loaded, whole = _tokenize(settings, tokenizer)
    figures = whole.receipt.sets["train"]
    record = figures.sources[0]
    # In qa_feedback `ranking` lists responses from best to worst: read as ranks it would contradict the scores.
    assert (record.format, record.read, record.kept) == ("scored", {"p": 154, "q": 500}[name[0]], kept)
    assert (record.dropped, record.changed) == (dropped, changed)
    assert (figures.responses, figures.list_sizes, len(whole.train)) == (responses, sizes, kept)
    for pairing, pairs in (("all_pairs", all_pairs), ("adjacent_pairs", adjacent_pairs)):
        made = data.tokenize(loaded, tokenizer, settings, lists=pairing)
        made.receipt.check()
        assert made.receipt.sets["train"].pairs == len(made.train) == len(set(made.train["row_id"])) == pairs
        assert made.receipt.sets["train"].sources == figures.sources


@pytest.mark.parametrize("name", ["pandalm_ranked", "qa_feedback_ranked"])
def test_responses_are_ranked_by_their_scores(name: str, shared: Path) -> None:
    settings = _settings(shared, name)
    raw = datasets.load_dataset("json", data_files=settings.train[0].source, split="train")
    for row in data.load(settings).train:
        source = raw[int(row.row_id.rpartition(":")[2])]
        # Of responses with the same text the best counts, so the highest score is written last.
        scores = dict(sorted(zip(source["responses"], source["scores"], strict=True), key=itemgetter(1)))
        found = [scores[str(response)] for response in row.responses]
        assert found == sorted(found, reverse=True)
        levels = sorted(set(found), reverse=True)
        assert row.ranks == tuple(levels.index(score) for score in found)


@pytest.mark.parametrize("name", ["pandalm_ranked", "qa_feedback_ranked"])
def test_ids_of_lists_are_those_of_pairs(name: str, shared: Path, tokenizer: Any, tmp_path: Path) -> None:
    loaded, whole = _tokenize(_settings(shared, name, max_length=None), tokenizer)
    path = tmp_path / "pairs.jsonl"
    couples = [
        {"prompt": row.prompt, "chosen": row.responses[n], "rejected": row.responses[n + 1]}
        for row in loaded.train
        for n in range(len(row.responses) - 1)
    ]
    path.write_text("".join(json.dumps(couple) + "\n" for couple in couples), encoding="utf-8")
    settings = DatasetSettings(train=[Source(source=str(path))], max_length=None, shuffle=False)
    pairs = iter(_tokenize(settings, tokenizer)[1].train)
    for one in whole.train:
        for sides in itertools.pairwise(one["response_ids"]):
            pair = next(pairs)
            assert (pair["prompt_ids"], pair["response_ids"]) == (one["prompt_ids"], list(sides))
    assert next(pairs, None) is None


@pytest.mark.parametrize("name", ["hh_helpful_harmless", "hh_helpful_harmless_chat"])
def test_ids_are_those_of_trl(name: str, shared: Path, stories: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = 400
    settings = _settings(shared, name, source={"split": f"train[2100:{2100 + rows}]"}, max_length=None)
    _, tokens = _tokenize(settings, tokenizer)
    raw = datasets.load_dataset("json", data_files=settings.train[0].source, split=settings.train[0].split)
    trainer = DPOTrainer(
        model=stories,
        args=DPOConfig(output_dir=str(tmp_path), max_length=None, report_to="none", use_cpu=True, bf16=False),
        train_dataset=raw.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )
    assert len(tokens.train) == len(trainer.train_dataset) == rows
    assert tokens.train["prompt_ids"][:] == trainer.train_dataset["prompt_ids"][:]
    for number, column in enumerate(("chosen_ids", "rejected_ids")):
        found = [sides[number] for sides in tokens.train["response_ids"]]
        assert found == trainer.train_dataset[column][:]
