"""The memory estimate against real tensors, and the ways in which its parts must move."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from trl import DPOConfig

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Regularizer, SoftSettings
from prefopt_cli.scoring import head
from prefopt_cli.scoring.forward import plain_model, score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training import memory_step
from prefopt_cli.training.memory import Sampling, estimate_memory, format_bytes
from prefopt_cli.training.memory_log import AllocationLog
from prefopt_cli.training.memory_optimizer import optimizer_state_bytes, optimizer_step_bytes
from prefopt_cli.training.memory_sampling import sampling_bytes
from prefopt_cli.training.memory_step import StepShape, trace_step
from prefopt_cli.training.sampling import sample_responses
from prefopt_cli.training.sampling_prompts import SamplingPrompts
from prefopt_cli.training.soft import SoftTrainer
from tests.tiny import build_tokenizer

PACKED, PADDED = Layout("pieces"), Layout()
WAYS = {"pieces": PACKED, "mask": Layout("mask"), "padded": PADDED}


def pairs(count: int = 2, prompt: int = 40, response: int = 24) -> list[Example]:
    """Pairs whose rejected response is a third of the chosen one."""
    lengths = prompt, response, max(response // 3, 1)
    return [
        Example(np.ones(lengths[0], int), tuple(np.ones(n, int) for n in lengths[1:])) for _ in range(count)
    ]


GIB = 2**30


def llama(**changes: Any) -> LlamaConfig:
    small = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**{**small, **changes})


LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def on_meta(config: Any, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return build(config, lora=lora, dtype=dtype)


def build(config: Any, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def estimate(
    model: Any,
    reference: str = "copy",
    *,
    batch: list[Example] | None = None,
    layout: Layout = PACKED,
    **changes: Any,
) -> Any:
    found = estimate_memory(model, batch or pairs(), layout, reference=reference, **changes)  # type: ignore[arg-type]
    assert found.method == "traced", found.notes
    return found


def size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


CONFIGS = {
    "llama": llama(),
    "qwen2-tied": Qwen2Config(**llama(tie_word_embeddings=True).to_diff_dict() | {"model_type": "qwen2"}),
    "gpt2": GPT2Config(vocab_size=500, n_embd=64, n_layer=3, n_head=4, n_positions=128),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_and_weights_are_those_of_the_built_model(name: str, lora: bool) -> None:
    real = build(CONFIGS[name], lora=lora)

    found = estimate(on_meta(CONFIGS[name], lora=lora), "adapter_disabled" if lora else "copy")

    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.trainable_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.parts["weights"] == size(real.parameters()) + size(real.buffers())
    assert found.total == sum(found.parts.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_alive_before_backward_is_what_autograd_saves_on_real_tensors(
    name: str, way: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by hooks on the real model and head: unique storages saved for backward that are not parameters."""
    real, layout = build(CONFIGS[name]).train(), WAYS[way]
    for module in real.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        real.gradient_checkpointing_enable({"use_reentrant": False})
    layout.prepare(real)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = layout.batch(pairs(), 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = score_responses(real, batch, layout).logps
    for tensor in [*real.parameters(), *real.buffers(), *batch.values()]:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    # The head keeps its probabilities on its own: 2 x (24 + 8) tokens of a vocabulary of 500 in float32.
    expected = sum(storage.nbytes() for storage in saved.values()) + 64 * 500 * 4
    assert logps.requires_grad

    alive: list[int] = []

    def count(_: torch.Tensor, log: AllocationLog) -> None:
        alive.append(sum(change for serial, change in log._events if log._parts[serial] != "weights"))

    monkeypatch.setattr(memory_step, "_backward", count)
    trace_step(
        on_meta(CONFIGS[name]),
        StepShape(pairs(), layout, "none", "no", checkpointing, accumulates=False, device="cpu"),
    )

    # What the hooks do not see is small: the head's own figures; with checkpointing, masks and rotary angles.
    spare = 2**14 + 2**15 * checkpointing
    assert expected - 2**14 <= alive[0] <= expected + spare


def test_the_log_counts_storages_once_and_finds_the_peak() -> None:
    log = AllocationLog()
    with log:
        first = torch.zeros(1000)  # 4000 bytes
        log.part = "later"
        second = torch.zeros(500)  # 2000
        view = first.view(10, 100).t()
        view.add_(1)
        del first
        third = torch.zeros(250) if view is not None else second  # 1000: the peak, the view holds `first`
        del view, second
        torch.zeros(1)
    del third

    assert log.peak() == {"activations": 4000, "later": 3000}


@pytest.mark.parametrize("way", ["pieces", "padded"])
def test_activations_are_linear_in_pairs(way: str) -> None:
    model = on_meta(llama())
    found = [
        estimate(model, "none", batch=pairs(count, 400, 24), layout=WAYS[way]).parts["activations"]
        for count in (2, 6)
    ]

    assert found[1] == pytest.approx(3 * found[0], rel=0.05)


def test_packed_rows_store_less_than_padded_ones() -> None:
    """A prompt of 400 tokens with responses of 24 and 8: 432 tokens instead of 2 rows of 424."""
    model, batch = on_meta(llama()), pairs(4, 400, 24)
    packed, padded = (estimate(model, "none", batch=batch, layout=layout) for layout in (PACKED, PADDED))

    assert packed.parts["activations"] < 0.6 * padded.parts["activations"]


def test_attention_on_cuda_is_counted_as_in_one_row_and_without_a_mask() -> None:
    model, batch = on_meta(llama()), pairs(4, 400, 24)
    blocks, masked = (
        estimate(model, "none", batch=batch, layout=layout, device="cuda")
        for layout in (Layout("blocks"), Layout("mask"))
    )

    assert 0.7 < blocks.parts["activations"] / masked.parts["activations"] < 1.1


def test_checkpointing_stores_less() -> None:
    model = on_meta(llama(num_hidden_layers=12))
    plain = estimate(model)
    checkpointed = estimate(model, gradient_checkpointing=True)

    assert checkpointed.parts["activations"] < plain.parts["activations"] / 4
    assert checkpointed.total < plain.total


def test_eager_attention_stores_the_scores() -> None:
    """4 rows x 4 heads x 256 x 256 scores of 4 bytes are 4 MiB in each of 4 layers; sdpa's mask is 1 MiB."""
    sdpa, eager = on_meta(llama()), on_meta(llama(attn_implementation="eager"))
    batch = pairs(2, 128, 128)
    stored = [estimate(model, batch=batch, layout=PADDED).parts["activations"] for model in (sdpa, eager)]

    assert stored[1] - stored[0] >= 4 * 2.5 * 2**20


def test_a_reference_copy_costs_the_weights_again_and_an_adapter_needs_none() -> None:
    full, lora = on_meta(llama()), on_meta(llama(), lora=True)
    with_copy, without = estimate(full), estimate(full, "none")
    switched_off = estimate(lora, "adapter_disabled")

    assert with_copy.parts["frozen policy"] == with_copy.parts["weights"]
    assert "frozen policy" not in without.parts
    assert "frozen policy" not in switched_off.parts


def test_lora_drops_gradients_and_optimizer_states_of_the_frozen_weights() -> None:
    wide = llama(hidden_size=256, intermediate_size=1024)
    batch = pairs(1, 2, 2)  # small activations: the peak is where the gradients are
    full = estimate(on_meta(wide), batch=batch)
    lora = estimate(on_meta(wide, lora=True), "adapter_disabled", batch=batch)

    assert full.parts["optimizer"] == 8 * full.trainable_parameters
    assert lora.parts["optimizer"] == 8 * lora.trainable_parameters
    assert lora.trainable_parameters < full.trainable_parameters / 10
    assert lora.parts.get("gradients", 0) <= 4 * lora.trainable_parameters
    assert full.parts["gradients"] > 4 * lora.trainable_parameters


def test_accumulated_gradients_are_there_in_the_forward_pass() -> None:
    model = on_meta(llama(vocab_size=4000))
    once = estimate(model)
    twice = estimate(model, gradient_accumulation_steps=2)

    assert twice.parts["gradients"] == 4 * twice.trainable_parameters
    assert once.parts.get("gradients", 0) < twice.parts["gradients"]


def test_autocast_halves_activations_and_adds_weight_copies() -> None:
    model = on_meta(llama())
    full, half = estimate(model), estimate(model, mixed_precision="bf16")

    assert half.parts["activations"] < 0.8 * full.parts["activations"]
    assert half.parts["weights"] == full.parts["weights"]
    assert 0 < half.parts["low-precision weight copies"] <= full.parts["weights"]
    assert "low-precision weight copies" not in full.parts


def test_bfloat16_weights_take_half() -> None:
    found = [estimate(on_meta(llama(), dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]

    assert found[1].parts["weights"] == pytest.approx(found[0].parts["weights"] / 2, rel=0.01)
    assert found[1].parts["optimizer"] == found[0].parts["optimizer"] / 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_head_runs_on_responses_only(device: str) -> None:
    model = on_meta(llama(vocab_size=8000))
    long, short = (
        estimate(model, "none", batch=pairs(4, 512 - length, length), layout=PADDED, device=device)
        for length in (400, 10)
    )

    assert short.parts.get("LM head", 0) < long.parts["LM head"]
    assert short.total < long.total


def test_the_head_keeps_no_more_than_its_limit() -> None:
    """1,400 response tokens of a vocabulary of 32,000 would be 171 MiB of probabilities."""
    found = estimate(on_meta(llama(vocab_size=32000)), "none", batch=pairs(2, 500, 525))
    chunk = head.CHUNK_ROWS * 32000 * 4

    # The chunk at work is there three times: logits, log-probabilities, and their product's gradient.
    assert head.KEPT_BYTES - chunk <= found.parts["LM head"] <= head.KEPT_BYTES + 4 * chunk


def test_the_peak_is_the_optimizer_step_when_activations_are_tiny() -> None:
    model = on_meta(llama(hidden_size=256, intermediate_size=4096, vocab_size=100))
    found = estimate(model, "none", batch=pairs(1, 1, 1), optimizer="adamw_torch", device="cuda")
    trained = 4 * found.trainable_parameters

    assert found.phase == "optimizer step"
    assert found.parts["gradients"] == trained
    assert found.parts["optimizer"] == 2 * trained
    assert found.parts["optimizer temporaries"] == trained


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_torch_fused", 8 * 100_000),
        ("adamw_torch", 8 * 100_000),
        ("sgd", 0),
        ("adafactor", 4 * (100 + 1000)),
        ("adamw_8bit", 2 * (100_000 + 4 * 100_000 // 256)),
        ("paged_adamw_32bit", 8 * 100_000),
        ("paged_adamw_8bit", 2 * (100_000 + 4 * 100_000 // 256)),
        ("lion_8bit", 100_000 + 4 * 100_000 // 256),
        ("ademamix", 12 * 100_000),
    ],
)
def test_optimizer_states_of_a_matrix(name: str, expected: int) -> None:
    assert optimizer_state_bytes(name, [torch.empty(100, 1000, device="meta")]) == pytest.approx(
        expected, abs=4
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_optimizer_states_are_those_of_a_real_step(name: str, make: Any) -> None:
    parameters = [torch.nn.Parameter(torch.ones(64, 32)), torch.nn.Parameter(torch.ones(7))]
    optimizer = make(parameters, lr=0.1)
    sum(p.sum() for p in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    )

    assert optimizer_state_bytes(name, parameters) == kept


def test_small_tensors_stay_in_float32_in_8bit_optimizers() -> None:
    assert optimizer_state_bytes("adamw_8bit", [torch.empty(100, device="meta")]) == 800


def test_loop_optimizers_need_room_for_the_largest_parameter() -> None:
    parameters = [torch.empty(10, 10), torch.empty(5)]

    assert optimizer_step_bytes("adamw_torch", parameters, "cpu") == 2 * 400
    assert optimizer_step_bytes("adamw_torch", parameters, "cuda") == 420
    assert optimizer_step_bytes("adamw_torch_fused", parameters, "cuda") == 0
    assert optimizer_step_bytes("adamw_torch", [], "cpu") == 0


def test_an_unknown_optimizer_is_assumed_to_be_adamw_and_says_so() -> None:
    found = estimate(on_meta(llama()), optimizer="galore_adamw")

    assert found.parts["optimizer"] == 8 * found.trainable_parameters
    assert "galore_adamw" in found.notes[0]


def test_an_8b_model_takes_no_memory_to_estimate() -> None:
    before = resident_bytes()
    found = estimate(
        on_meta(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16),
        "copy",
        batch=pairs(2, 768, 256),
        layout=Layout("blocks"),
        mixed_precision="bf16",
        gradient_checkpointing=True,
        device="cuda",
    )

    assert resident_bytes() - before < 0.5 * GIB
    assert found.parts["weights"] > 14.9 * GIB  # 8.03e9 numbers of 2 bytes
    assert 4.9 * 14.9 * GIB < found.total < 90 * GIB  # two copies, gradients, two states; little else


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def test_a_model_that_needs_data_falls_back_to_a_labelled_formula() -> None:
    class Branching(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden) if hidden.sum() > 0 else hidden

    model = on_meta(llama())
    traced = estimate(model)
    model.model.layers[0].mlp = Branching(model.model.layers[0].mlp)

    found = estimate_memory(model, pairs(), PACKED, reference="copy")

    assert found.method == "formula"
    assert "rule of thumb" in found.notes[0]
    assert found.parameters == traced.parameters
    assert found.parts["weights"] == traced.parts["weights"]
    assert traced.parts["activations"] / 3 < found.parts["activations"] < 3 * traced.parts["activations"]


def test_the_model_is_left_as_it_is() -> None:
    model = build(llama(), lora=True).eval()
    before = {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())

    estimate(model, "adapter_disabled", gradient_checkpointing=True)

    assert {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert plain_model(model).config._attn_implementation == "sdpa"
    assert not hasattr(plain_model(model), "scores_responses")
    assert head.token_scores.__module__ == head.__name__
    assert all(p.grad is None for p in model.parameters())


def test_impossible_questions_are_user_errors() -> None:
    with pytest.raises(UserError, match="no adapter"):
        estimate_memory(on_meta(llama()), pairs(), PACKED, reference="adapter_disabled")
    with pytest.raises(UserError, match="nothing to score"):
        estimate_memory(on_meta(llama()), [], PACKED, reference="none")


# --- the policy's own samples

DRAW = Sampling((48, 40, 40, 30, 30, 24), 32)


class LoggedTrainer(SoftTrainer):
    """Keeps the bytes alive at the peak of the second step, which draws no samples but uses those of the first."""

    peak = 0

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        log = AllocationLog()
        with log:
            log.own(self.model.parameters(), "weights")
            log.own(self.ref_model.parameters() if self.ref_model else (), "frozen policy")
            log.own([p.grad for p in self.model.parameters() if p.grad is not None], "gradients")
            log.own([group.reference.hidden for group in self.samples._groups], "reference states")
            loss: torch.Tensor = super().training_step(*arguments, **options)
        if self.state.global_step == 1:
            self.peak = max(self.peak, sum(log.peak().values()))
        return loss


STEPS = {
    "full": {},
    "lora": {"lora": True},
    "padded": {"layout": PADDED},
    "checkpointing": {"checkpointing": True},
    "accumulation": {"accumulation": 2},
    "bf16": {"precision": "bf16"},
    "large-vocabulary": {"vocab_size": 32000},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_with_samples_takes_what_a_real_one_takes(case: str, tmp_path: Path) -> None:
    plain = {"lora": False, "layout": PACKED, "checkpointing": False, "accumulation": 1, "precision": "no"}
    options = {**plain, **STEPS[case]}
    lora, layout, checkpointing, accumulation, precision = (
        options.pop(name) for name in ("lora", "layout", "checkpointing", "accumulation", "precision")
    )
    config = llama(hidden_size=128, intermediate_size=320, **options)
    batch = pairs(2)
    rows = [
        {"row_id": str(n), "prompt_ids": each.prompt, "response_ids": list(each.responses), "ranks": [0, 1]}
        for n, each in enumerate(batch * 2 * accumulation)
    ]
    prompts = [{"row_id": str(n), "prompt_ids": [1] * length} for n, length in enumerate(DRAW.prompts)]
    model = build(config, lora=lora)
    trainer = LoggedTrainer(
        settings=SoftSettings(
            name="soft",
            regularizer=Regularizer(num_prompts=len(DRAW.prompts), max_new_tokens=DRAW.max_new_tokens),
        ),
        sampling=SamplingPrompts(Dataset.from_list(prompts), DRAW.max_new_tokens),
        model=model.unload() if lora else model,
        ref_model=None if lora else copy.deepcopy(model),
        peft_config=model.peft_config["default"] if lora else None,
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            bf16=precision == "bf16",
            max_steps=2,
            max_length=None,
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset={},
        processing_class=build_tokenizer(),
        layout=layout,
    )
    trainer.train()

    found = trace_step(
        on_meta(config, lora=lora),
        StepShape(
            batch,
            layout,
            "adapter_disabled" if lora else "copy",
            precision,
            checkpointing,
            accumulates=accumulation > 1,
            device="cpu",
            samples=DRAW.examples(accumulation),
            kept_positions=DRAW.tokens,
        ),
    ).peak()
    assert sum(found.values()) == pytest.approx(trainer.peak, rel=0.1), found


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_writing_samples_takes_what_it_really_takes(name: str, lora: bool, precision: str) -> None:
    """A wider and a deeper model, whose parts weigh differently; GPT-2 is as it is."""
    model = build(CONFIGS[name], lora=lora)
    log = AllocationLog()
    with log:
        log.own(model.parameters(), "weights")
        sample_responses(
            model,
            [[1] * length for length in DRAW.prompts],
            max_new_tokens=DRAW.max_new_tokens,
            stop_ids=(),
            padding_id=0,
            seed=0,
            autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        )
    measured = sum(log.peak().values()) - size(model.parameters())

    expected = sum(sampling_bytes(on_meta(CONFIGS[name], lora=lora), DRAW, precision).values())
    assert expected == pytest.approx(measured, rel=0.25)


def test_trl_still_tiles_its_head_as_assumed() -> None:
    assert head.TRL_CHUNK == trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20 + 2**19, "3.5 MiB"),
        (15 * GIB, "15.0 GiB"),
        (2048 * GIB, "2.0 TiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
