"""The memory estimate of a step that reads degraded responses, against real tensors."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from prefopt_cli.recipe.schema import GPOSettings, SelfSupervisedSettings
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.gpo import GPOTrainer
from prefopt_cli.training.memory import estimate_memory
from prefopt_cli.training.memory_log import AllocationLog
from prefopt_cli.training.memory_step import StepShape, trace_step
from prefopt_cli.training.self_supervised import SelfSupervisedTrainer
from tests.tiny import build_tokenizer
from tests.training.test_memory import PACKED, PADDED, build, llama, on_meta

PROMPT, RESPONSES, VERSIONS = 40, (36, 24), ((28, 20, 10), (18, 12))


def settings(**changes: Any) -> SelfSupervisedSettings:
    """Three levels drawn: all that any response has but one, so that no draw is lighter than another."""
    align = GPOSettings(name="gpo", loss="logistic", beta=0.1)
    return SelfSupervisedSettings(name="self_supervised", align=align, levels_per_step=4, **changes)


def batch(count: int = 2) -> list[Example]:
    ones = [np.ones(length, int) for versions in VERSIONS for length in versions]
    responses = tuple(np.ones(length, int) for length in RESPONSES)
    return [Example(np.ones(PROMPT, int), responses, ones) for _ in range(count)]


def row(number: int) -> dict[str, Any]:
    return {
        "row_id": str(number),
        "prompt_ids": [1] * PROMPT,
        "response_ids": [[1] * length for length in RESPONSES],
        "ranks": [0, 1],
        "degraded_ids": [[[1] * length for length in versions] for versions in VERSIONS],
        "degraded_levels": [list(range(1, 1 + len(versions))) for versions in VERSIONS],
    }


class LoggedTrainer(SelfSupervisedTrainer.beside(GPOTrainer)):  # type: ignore[misc]
    """Keeps the bytes alive at the peak of the second step."""

    peak = 0

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        log = AllocationLog()
        with log:
            log.own(self.model.parameters(), "weights")
            log.own(self.ref_model.parameters() if self.ref_model else (), "frozen policy")
            loss: torch.Tensor = super().training_step(*arguments, **options)
        if self.state.global_step == 1:
            self.peak = sum(log.peak().values())
        return loss


STEPS: dict[str, dict[str, Any]] = {
    "full": {},
    "mean": {"pooling": "mean"},
    "lora": {"lora": True},
    "padded": {"layout": PADDED, "pooling": "mean"},
    "checkpointing": {"checkpointing": True},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_takes_what_a_real_one_takes(case: str, tmp_path: Path) -> None:
    plain = {"lora": False, "layout": PACKED, "checkpointing": False, "precision": "no", "pooling": "last"}
    lora, layout, checkpointing, precision, pooling = {**plain, **STEPS[case]}.values()
    config, degrees = llama(hidden_size=128, intermediate_size=320), settings(pooling=pooling)
    model = build(config, lora=lora)
    trainer = LoggedTrainer(
        degrees=degrees,
        settings=degrees.align,
        model=model.unload() if lora else model,
        ref_model=None if lora else copy.deepcopy(model),
        peft_config=model.peft_config["default"] if lora else None,
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
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
        train_dataset=Dataset.from_list([row(number) for number in range(4)]),
        eval_dataset={},
        processing_class=build_tokenizer(),
        layout=layout,
    )
    trainer.train()

    reference = "adapter_disabled" if lora else "copy"
    found = trace_step(
        on_meta(config, lora=lora),
        StepShape(batch(), layout, reference, precision, checkpointing, False, device="cpu", degrees=degrees),
    ).peak()
    assert sum(found.values()) == pytest.approx(trainer.peak, rel=0.1), found


def test_degraded_responses_are_in_the_activations_and_not_in_the_head() -> None:
    """Padded, seven rows of each pair instead of two, all of 76 tokens."""
    model = on_meta(llama(vocab_size=8000))
    plain = [Example(each.prompt, each.responses) for each in batch(4)]
    without, beside = (
        estimate_memory(model, examples, PADDED, reference="none", degrees=degrees)
        for examples, degrees in ((plain, None), (batch(4), settings()))
    )
    assert beside.method == "traced", beside.notes
    assert beside.parts["activations"] == pytest.approx(3.5 * without.parts["activations"], rel=0.05)
    assert beside.parts["LM head"] == pytest.approx(without.parts["LM head"], rel=0.1)
