"""The trainers that `benchmarks.throughput` compares, set up alike."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.throughput_subject import PairSet, Subject, adapter, load_policy, tokenizer_of
from prefopt_cli.recipe.schema import GPOSettings
from prefopt_cli.training.gpo import GPOTrainer

OURS, PRECOMPUTED, PLAIN = "prefopt", "trl-precomputed", "trl"
PEERS = (OURS, PRECOMPUTED, PLAIN)
LOGGING_STEPS = 10  # TRL's default


class TimedDPOTrainer(DPOTrainer):
    """TRL's trainer, which tells how long it computed reference scores before training."""

    precompute_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.precompute_seconds += time.perf_counter() - start
        return dataset


def arguments(subject: Subject, folder: Path, batch: int, steps: int, **changes: Any) -> DPOConfig:
    """What all peers share; the rest are TRL's defaults (fused AdamW, linear schedule, clipping at 1)."""
    return DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=subject.learning_rate,
        logging_steps=LOGGING_STEPS,
        gradient_checkpointing=subject.gradient_checkpointing,
        bf16=subject.dtype != "float32",
        use_cpu=subject.device == "cpu",
        train_sampling_strategy="sequential",  # the same batches for all
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )


def own_arguments(subject: Subject, folder: Path, batch: int, steps: int) -> DPOConfig:
    """Of prefopt's trainers, as `prefopt_cli.training.arguments` has them."""
    return arguments(
        subject,
        folder,
        batch,
        steps,
        max_length=None,
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=subject.device == "cuda",
    )


def build_trainer(
    name: str,
    subject: Subject,
    folder: Path,
    pairs: PairSet,
    scores: Mapping[str, Sequence[float]],
    *,
    batch: int,
    steps: int,
    reference: str = "reference",
) -> DPOTrainer:
    """One peer, with a policy of its own.

    Args:
        scores: the columns of reference scores that prefopt's side reads.
        reference: the folder of the reference policy's weights.
    """
    model = load_policy(folder, subject)
    if name == OURS:
        tokens = pairs.tokens
        for column, values in scores.items():
            tokens = tokens.add_column(column, list(values[: len(tokens)]))
        return GPOTrainer(
            settings=GPOSettings(name="gpo"),
            model=model,
            ref_model=None,  # the scores are there
            args=own_arguments(subject, folder, batch, steps),
            train_dataset=tokens,
            eval_dataset={},
            processing_class=tokenizer_of(folder),
            peft_config=adapter(subject),
        )
    precompute = name == PRECOMPUTED
    # Scores of the policy itself are computed with the policy: no second model then.
    alone = (precompute and reference == "model") or subject.lora_rank > 0
    trainer = TimedDPOTrainer(
        model=model,
        ref_model=None if alone else load_policy(folder, subject, reference),
        args=arguments(
            subject, folder, batch, steps, max_length=longest(pairs), precompute_ref_log_probs=precompute
        ),
        train_dataset=Dataset.from_list(pairs.rows),
        processing_class=tokenizer_of(folder),
        peft_config=adapter(subject),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def longest(pairs: PairSet) -> int:
    """Tokens of the longest sequence, at which all peers cut."""
    return max(prompt + max(responses) for prompt, *responses in pairs.shapes)
