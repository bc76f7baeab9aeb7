"""What each of several processes holds: arithmetic by hand, and the ways in which engines must differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt_cli.models.quantised import weight_bytes
from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.recipe.schema import QuantizationSettings
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.engines import sharding_asked
from prefopt_cli.training.memory import Forward, Sharing, estimate_memory
from prefopt_cli.training.memory_engines import BUCKET_NUMBERS, hold
from prefopt_cli.training.memory_units import model_bytes, shard_share
from tests.training.test_memory import estimate, llama, on_meta, pairs

WIDE = llama(vocab_size=3000, hidden_size=256, intermediate_size=1024)
LAYER = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024 + 2 * 256)
"""Bytes of a layer: queries and output, keys and values, three matrices of the feed-forward part, two norms."""
TABLE = 4 * 3000 * 256
"""Bytes of the embedding, and of the head."""
SMALL = pairs(1, 2, 2)


def shared(engine: str = "fsdp", processes: int = 4, **options: Any) -> Sharing:
    return Sharing(engine, processes, **options)  # type: ignore[arg-type]


def test_ddp_holds_all_and_the_gradients_twice() -> None:
    model = on_meta(WIDE)
    alone, two = estimate(model, "none"), estimate(model, "none", sharing=shared("ddp", 2))

    assert "gradient buckets" not in alone.parts
    assert two.parts["gradient buckets"] == 4 * two.trainable_parameters
    assert {
        name: size for name, size in two.parts.items() if name in ("weights", "optimizer", "activations")
    } == {name: alone.parts[name] for name in ("weights", "optimizer", "activations")}


def test_fsdp_holds_a_part_and_gathers_two_layers_and_the_piece_at_the_end() -> None:
    model = on_meta(WIDE)
    alone, found = estimate(model, "none"), estimate(model, "none", sharing=shared())

    for part in ("weights", "optimizer"):
        assert found.parts[part] == pytest.approx(alone.parts[part] / 4, rel=0.001), part
    final_norm = 4 * 256
    assert found.parts["gathered weights"] == 2 * LAYER + TABLE + final_norm
    assert found.parts["gathered gradients"] == 2 * max(LAYER, TABLE)
    kept = estimate(model, "none", sharing=shared(reshard_after_forward=False))
    assert kept.parts["gathered weights"] == 4 * kept.parameters


def test_tied_weights_are_one_piece() -> None:
    tied, untied = (
        model_bytes(on_meta(llama(tie_word_embeddings=tie)), low_precision=False) for tie in (True, False)
    )
    assert tied.gathered == untied.gathered
    assert untied.computed_weights - tied.computed_weights == 4 * 500 * 64


def test_parts_are_filled_up_to_equal_ones() -> None:
    """7 rows on 4 processes: 2 each, so 8 of 7; a bias of 2 on 4: 1 each, so 4 of 2."""
    matrix, bias = torch.empty(7, 10, device="meta"), torch.empty(2, device="meta")

    assert shard_share([matrix], 4) == pytest.approx(2 / 7)
    assert shard_share([bias], 4) == pytest.approx(1 / 2)
    assert shard_share([matrix, bias], 4) == pytest.approx(21 / 72)
    assert shard_share([matrix], 1) == 1


def test_low_precision_gathers_half_and_leaves_autocast_nothing_to_copy() -> None:
    model = on_meta(WIDE)
    full, half = (estimate(model, "none", mixed_precision=each, sharing=shared()) for each in ("no", "bf16"))

    assert half.parts["gathered weights"] == full.parts["gathered weights"] / 2
    assert "low-precision weight copies" in estimate(model, "none", mixed_precision="bf16").parts
    assert "low-precision weight copies" not in half.parts


def test_gradients_of_several_micro_batches_stay_whole_unless_each_is_sharded() -> None:
    model = on_meta(WIDE)
    whole, each = (
        estimate(model, "none", gradient_accumulation_steps=2, sharing=shared(sync_each_batch=sync))
        for sync in (False, True)
    )
    assert whole.parts["gradients"] == 4 * whole.trainable_parameters
    assert each.parts["gradients"] == pytest.approx(each.trainable_parameters, rel=0.001)


def test_zero_stages_shard_one_thing_more_each() -> None:
    model = on_meta(WIDE)
    stages = [
        estimate(
            model, "none", gradient_accumulation_steps=2, sharing=shared("deepspeed", zero_stage=stage)
        ).parts
        for stage in (1, 2, 3)
    ]
    numbers = sum(parameter.numel() for parameter in model.parameters())

    # Two states and the copy that the optimizer steps on.
    assert [each["optimizer"] for each in stages] == pytest.approx([12 * numbers / 4] * 3, rel=0.001)
    assert [each["gradients"] / numbers for each in stages] == pytest.approx([4, 1, 1], rel=0.001)
    weights = [each["weights"] / stages[0]["weights"] for each in stages]
    assert weights == pytest.approx([1, 1, 1 / 4], rel=0.001)
    assert {each["communication buckets"] for each in stages} == {4 * BUCKET_NUMBERS}
    assert "gathered weights" not in stages[1]
    assert stages[2]["gathered weights"] == 4 * numbers


def test_zero_without_a_stage_shards_nothing() -> None:
    """Which only a file of DeepSpeed's can ask for."""
    model = on_meta(WIDE)
    none, first = (
        estimate(model, "none", sharing=shared("deepspeed", zero_stage=stage)).parts for stage in (0, 1)
    )
    assert none["optimizer"] == pytest.approx(4 * first["optimizer"], rel=0.001)
    assert {name: none[name] for name in ("weights", "gradients")} == {
        name: first[name] for name in ("weights", "gradients")
    }


def test_what_is_to_be_sharded_is_read_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    in_file = LaunchSettings(engine="deepspeed", config=str(path), processes=2)
    assert sharding_asked(in_file) == ("deepspeed", 3)
    assert sharding_asked(LaunchSettings(config=str(tmp_path / "gone.yaml"))) == ("ddp", 2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as the launcher's processes see it
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert sharding_asked(in_file) == ("deepspeed", 3)
    assert sharding_asked(LaunchSettings()) == ("deepspeed", 3)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    assert sharding_asked(LaunchSettings(zero_stage=1)) == ("deepspeed", 2), (
        "accelerate's where nothing is said"
    )
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert sharding_asked(LaunchSettings(zero_stage=1)) == ("deepspeed", 3)


def test_what_is_offloaded_is_on_the_host_on_a_gpu_only() -> None:
    model = on_meta(WIDE)
    here, gpu = (
        estimate(model, "none", sharing=shared(cpu_offload=True), device=device) for device in ("cpu", "cuda")
    )
    numbers = gpu.parameters

    assert here.host == {}
    assert here.parts["optimizer"] == pytest.approx(2 * numbers, rel=0.001)
    assert gpu.host == pytest.approx(
        {"weights": numbers, "gradients": numbers, "optimizer": 2 * numbers}, rel=0.001
    )
    assert not {"weights", "gradients", "optimizer"} & set(gpu.parts)
    assert gpu.parts["gathered weights"] > 0
    stage_two = estimate(model, "none", sharing=shared("deepspeed", cpu_offload=True), device="cuda")
    assert set(stage_two.host) == {"optimizer", "gradients"}
    assert "weights" in stage_two.parts


def test_an_adapter_leaves_little_to_share() -> None:
    lora = on_meta(WIDE, lora=True)
    ddp, fsdp = (estimate(lora, "none", batch=SMALL, sharing=shared(engine)) for engine in ("ddp", "fsdp"))
    assert ddp.parts["gradient buckets"] == 4 * ddp.trainable_parameters
    assert fsdp.parts["optimizer"] == pytest.approx(2 * fsdp.trainable_parameters, rel=0.02)
    assert fsdp.parts["gathered weights"] > 2 * LAYER
    assert fsdp.parts["gathered gradients"] < LAYER / 4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_stored_in_few_bits(bits: int) -> None:
    base = AutoModelForCausalLM.from_config(WIDE, dtype=torch.bfloat16).to("meta")
    lora = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = QuantizationSettings(bits=bits)
    plain, few = (estimate(lora, "none", quantization=each) for each in (None, settings))

    buffers = sum(each.nbytes for each in lora.buffers())
    assert few.parts["weights"] == pytest.approx(weight_bytes(lora, settings) + buffers, rel=1e-6)
    assert few.parts["weights"] < plain.parts["weights"]
    assert few.parts.get("dequantised weights", 0) == (2 * 256 * 1024 if bits == 4 else 0)
    # Packed bits are not sharded.
    sharded = estimate(lora, "none", quantization=settings, sharing=shared())
    assert sharded.parts["weights"] == few.parts["weights"]


def test_before_training_a_process_holds_the_whole_model_but_under_fsdp() -> None:
    model = on_meta(WIDE)
    forward = Forward(scored=4096, longest=64, evaluated=0)

    def found(device: str = "cuda", **sharing: Any) -> Any:
        return estimate(
            model,
            "none",
            batch=SMALL,
            forward=forward,
            sharing=shared(processes=64, **sharing),
            device=device,
        )

    whole, sharded = found(engine="deepspeed", zero_stage=3), found()
    weights = 4 * whole.parameters + sum(each.nbytes for each in model.buffers())
    assert whole.whole_before
    assert whole.before["weights"] == weights
    assert weights < whole.needed_before < sum(whole.before.values()), "batches may be halved"
    on_the_cpu = found("cpu", engine="deepspeed", zero_stage=3)
    assert on_the_cpu.needed_before == sum(on_the_cpu.before.values()), "the system ends who takes too much"
    assert not sharded.whole_before
    assert sharded.before["weights"] < weights / 32
    assert sharded.before["gathered weights"] < weights
    assert sharded.needed_before == sum(sharded.before.values()), "batches are not halved"


def test_before_training_fsdp_leaves_autocast_nothing_to_copy() -> None:
    """It gathers weights in low precision; autocast would make a copy of each in it."""
    model = on_meta(WIDE)
    forward = Forward(scored=64, longest=64, evaluated=0)
    whole, sharded = (
        estimate(model, "none", batch=SMALL, forward=forward, sharing=each, mixed_precision="bf16")
        for each in (shared("ddp", 8), shared("fsdp", 8))
    )
    copies = "low-precision weight copies"
    assert whole.before[copies] > whole.parameters
    assert sharded.before.get(copies, 0) == 0
    assert sharded.needed_before < whole.needed_before / 2


def test_a_large_evaluation_may_be_the_peak() -> None:
    model = on_meta(llama())
    forward = Forward(scored=64, longest=64, evaluated=2**20)
    found = estimate(model, "none", batch=SMALL, forward=forward)

    assert found.phase == "evaluation"
    assert estimate(model, "none", batch=SMALL).phase != "evaluation"


def test_more_processes_never_take_more_where_all_is_sharded() -> None:
    model = on_meta(WIDE)
    totals = [estimate(model, "none", sharing=shared(processes=count)).total for count in (2, 4, 8, 16)]

    assert totals == sorted(totals, reverse=True)


def test_a_frozen_copy_is_sharded_like_the_policy() -> None:
    model = on_meta(WIDE)
    found = estimate(model, "copy", sharing=shared())

    assert found.parts["frozen policy"] == found.parts["weights"]
    holdings = [
        hold(model, shared(), states=0, low_precision=False, reference_copy=copy) for copy in (False, True)
    ]
    assert holdings[1].passing["gathered weights"] - holdings[0].passing["gathered weights"] == TABLE


def test_the_formula_knows_engines_too() -> None:
    class Branching(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden if hidden.sum() > 0 else -hidden

    model = on_meta(WIDE)
    model.model.norm = Branching()
    found = estimate_memory(model, pairs(), Layout("pieces"), reference="none", sharing=shared())

    assert found.method == "formula"
    assert found.parts["weights"] == pytest.approx(found.parameters, rel=0.01)
