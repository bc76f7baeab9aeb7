"""`prefopt check --memory` and weights of few bits: proposed where training takes them, and in the way it does."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BitsAndBytesConfig, Qwen2Config

from prefopt_cli.recipe import load_recipe
from prefopt_cli.training.memory_fit import Fit
from prefopt_cli.training.memory_settings import rungs
from tests.cli.test_check_fit import Fits, middling, model  # noqa: F401  (fixtures)
from tests.tiny import build_tokenizer
from tests.training.conftest import LORA, Run, make_recipe, run  # noqa: F401  (fixtures)

pytest.importorskip("bitsandbytes")

FSDP = "launch={engine: fsdp, processes: 8}"
ZERO = "launch={engine: deepspeed, zero_stage: 3, processes: 8}"
TINY = 1.0
"""MiB that nothing fits, so that every rung is tried."""


def quantisation(found: Fit) -> Any:
    """What is proposed, or tried last, for it."""
    best = found.proposal or found.smallest
    assert best is not None
    return next((each for each in best.overrides if each.startswith("quantization")), None)


def tried_with(fits: Fits) -> list[list[str]]:
    """The overrides of every rung but the first, which has none."""
    base = fits.memory.base(fits.recipe)
    found = rungs(fits.recipe, processes=8, on_gpu=True, reference_on_data=True, base=base)
    return [[each.override for each in rung.settings] for rung in found if rung.settings]


def test_a_large_model_under_fsdp_fits_in_4_bits(recipe: Path, tmp_path: Path) -> None:
    """The size of Qwen2.5-7B: whole in every process before training, 14 GiB in bfloat16 and 5.4 in 4 bits."""
    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(tmp_path / "large")
    build_tokenizer().save_pretrained(tmp_path / "large")
    place = f"model.name_or_path={tmp_path / 'large'}"
    found = Fits(recipe, place, FSDP, "adapter={type: lora, r: 16}")(12 * 1024)

    assert not found.as_it_is
    assert found.proposal is not None
    assert quantisation(found) == "quantization={bits: 4, storage_dtype: bfloat16}"
    assert found.proposal.estimate.needed_before < 6 * 2**30


def test_zero_stage_3_is_lowered_for_4_bits(recipe: Path, model: str) -> None:  # noqa: F811
    fits = Fits(recipe, model, ZERO, LORA)
    rungs = [each for each in tried_with(fits) if any("bits" in one for one in each)]

    assert rungs
    for overrides in rungs:
        assert "launch.zero_stage=2" in overrides
        fits.change(overrides)  # is a sound recipe


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_few_bits_keeps_them_and_is_not_sharded(
    recipe: Path,
    middling: Path,  # noqa: F811
    tmp_path: Path,
    bits: int,
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for file in middling.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = json.loads(
        BitsAndBytesConfig(**{f"load_in_{bits}bit": True}).to_json_string(use_diff=False)
    )
    (folder / "config.json").write_text(json.dumps(config))
    fits = Fits(recipe, f"model.name_or_path={folder}", LORA, "launch.processes=8")

    assert fits.memory.estimate(fits.recipe).parts["weights"] < 50 * 2**20, "as they are stored"
    assert quantisation(fits(TINY)) is None
    tried = [each for overrides in tried_with(fits) for each in overrides]
    assert tried
    assert not any(each.startswith(("quantization", "launch.engine")) for each in tried)


def test_an_adapter_is_not_moved_to_4_bits(recipe: Path, run: Run) -> None:  # noqa: F811
    first = run("first", LORA, "training.max_steps=1").run
    fits = Fits(recipe, f"model.name_or_path={first.path}", LORA)

    assert quantisation(fits(TINY)) is None
    again = Fits(recipe, LORA)
    assert quantisation(again(TINY)) == "quantization={bits: 4}", "where there is no adapter yet"
    assert load_recipe(recipe, [LORA, "quantization={bits: 4}"])
