"""Real preference data through a real tokenizer: every row accounted for, and the same ids as TRL's."""

import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefopt_cli import data
from prefopt_cli.data.examples import PreferenceData
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import DatasetSettings

pytestmark = pytest.mark.real

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


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
        for side in ("chosen_ids", "rejected_ids"):
            assert one[side].count(tokenizer.eos_token_id) == 1
            assert one[side][-1] == tokenizer.eos_token_id
            assert len(one["prompt_ids"]) + len(one[side]) <= 512


def test_every_hh_chat_is_accounted_for(shared: Path, tokenizer: Any) -> None:
    _, tokens = _tokenize(_settings(shared, "hh_helpful_harmless_chat"), tokenizer)
    record = tokens.receipt.sets["train"].sources[0]
    assert (record.format, record.read, record.kept) == ("conversational", 4632, 3022)
    assert record.changed == {}
    for one in tokens.train:
        assert one["prompt_ids"].count(tokenizer.bos_token_id) == 1
        assert one["chosen_ids"][-1] == one["rejected_ids"][-1] == tokenizer.eos_token_id
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


@pytest.mark.parametrize("name", ["pandalm_ranked", "qa_feedback_ranked"])
def test_ranked_lists_are_refused_by_name_of_their_columns(name: str, shared: Path) -> None:
    with pytest.raises(
        UserError, match=r"columns found: .*responses \(list of text\), scores \(list of number\)"
    ):
        data.load(_settings(shared, name))


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
    for column in COLUMNS:
        assert tokens.train[column][:] == trainer.train_dataset[column][:]
