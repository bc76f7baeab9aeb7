"""Does `estimate_memory` say how much memory training takes? Run it and compare.

    python benchmarks/memory.py                 # all cases, writes benchmarks/results/memory.{md,json}
    python benchmarks/memory.py llama-50m       # only cases whose name contains this, writes nothing

Each case trains a random model for two steps in a process of its own, as `prefopt train` does: packed batches, and
reference scores that are known, unless the case says otherwise; `soft` has no reference scores, but samples and the
KL to a reference on them. On the CPU the measure is the rise of
the process's peak resident memory (Linux, VmHWM) over its resident memory after the imports. It is taken
twice: with glibc's allocator as it is, which keeps part of what is freed, and told to return every freed
tensor to the system (MALLOC_MMAP_THRESHOLD_), which shows what is alive. On CUDA the measure is
`torch.cuda.max_memory_allocated`.
"""

import argparse
import copy
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from trl import DPOConfig

from prefopt_cli.recipe.schema import GPOSettings, Regularizer, SoftSettings
from prefopt_cli.scoring.choice import packed_layouts
from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.gpo import GPOTrainer
from prefopt_cli.training.memory import MemoryEstimate, Sampling, estimate_memory, format_bytes
from prefopt_cli.training.sampling_prompts import SamplingPrompts
from prefopt_cli.training.soft import SoftTrainer
from prefopt_cli.training.trainer import REFERENCE_COLUMNS, PreferenceTrainer

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 32000
TOLERANCE = 0.25

CONFIGS = {
    "llama-50m": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "llama-110m": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=12,
    ),
    "qwen2-100m-tied": lambda: Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2-124m": lambda: GPT2Config(vocab_size=50257),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    lora: bool = False
    pairs: int = 2
    length: int = 256
    checkpointing: bool = False
    bf16: bool = False
    accumulation: int = 1
    optimizer: str = "adamw_torch_fused"
    padded: bool = False
    reference_pass: bool = False
    samples: int = 0
    """Responses of the policy itself, half of `length` to prompts of the other half: `soft` instead of `gpo`."""

    @property
    def name(self) -> str:
        words = [self.model, "lora" if self.lora else "full", f"{self.pairs}x{self.length}"]
        words += ["checkpointing"] * self.checkpointing + ["bf16"] * self.bf16
        words += [f"accumulation-{self.accumulation}"] * (self.accumulation > 1)
        words += [self.optimizer] * (self.optimizer != "adamw_torch_fused")
        words += ["padded"] * self.padded + ["reference-pass"] * self.reference_pass
        words += [f"soft-{self.samples}"] * (self.samples > 0)
        return " ".join(words)


CASES = [
    Case("llama-50m"),
    Case("llama-50m", pairs=4, length=512),
    Case("llama-50m", pairs=4, checkpointing=True),
    Case("llama-50m", lora=True, pairs=4),
    Case("llama-110m"),
    Case("llama-110m", bf16=True),
    Case("llama-110m", lora=True, length=512, checkpointing=True),
    Case("qwen2-100m-tied", pairs=4),
    Case("qwen2-100m-tied", lora=True),
    Case("gpt2-124m", accumulation=2),
    Case("gpt2-124m", checkpointing=True, optimizer="adamw_torch"),
    Case("gpt2-124m", lora=True, length=512),
    Case("llama-50m", pairs=4, padded=True),
    Case("llama-50m", pairs=4, reference_pass=True),
    Case("llama-50m", samples=4),
    Case("llama-50m", lora=True, samples=16, checkpointing=True),
    Case("llama-50m", samples=8, accumulation=2),
]


def build(case: Case) -> Any:
    """The policy, on whatever device is current."""
    model = AutoModelForCausalLM.from_config(CONFIGS[case.model](), dtype=torch.float32)
    if not case.lora:
        return model
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def estimate(case: Case) -> MemoryEstimate:
    with torch.device("meta"):
        model = build(case)
    rows = random_pairs(case, case.pairs)
    return estimate_memory(
        model,
        [Example(row["prompt_ids"], tuple(row["response_ids"])) for row in rows],
        Layout() if case.padded else packed_layouts(plain_model(model), DEVICE)[0],
        reference="none" if not keeps_reference(case) else "adapter_disabled" if case.lora else "copy",
        optimizer=case.optimizer,
        mixed_precision="bf16" if case.bf16 else "no",
        gradient_checkpointing=case.checkpointing,
        gradient_accumulation_steps=case.accumulation,
        device=DEVICE,
        sampling=Sampling((case.length // 2,) * case.samples, case.length // 2) if case.samples else None,
    )


def keeps_reference(case: Case) -> bool:
    """Whether the reference policy is there while training."""
    return case.reference_pass or case.samples > 0


def train(case: Case, folder: str) -> int:
    """Two steps (the optimizer has states in the second); returns the measured bytes."""
    baseline = start_measuring()
    policy = build(case)
    reference = copy.deepcopy(policy) if keeps_reference(case) and not case.lora else None
    if case.lora:
        # A PeftModel would get a second, frozen adapter; the trainer wraps a plain model and switches it off.
        policy, peft_config = policy.unload(), policy.peft_config["default"]
    dataset = Dataset.from_list(random_pairs(case, 2 * case.pairs * case.accumulation))
    if not keeps_reference(case):
        for column in REFERENCE_COLUMNS:
            dataset = dataset.add_column(column, [-500.0] * len(dataset))
    trainer = trainer_class(case)(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.pairs,
            gradient_accumulation_steps=case.accumulation,
            max_steps=2,
            max_length=None,
            remove_unused_columns=False,
            bf16=case.bf16,
            gradient_checkpointing=case.checkpointing,
            optim=case.optimizer,
            use_cpu=DEVICE == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        eval_dataset={},
        processing_class=tokenizer(),
        peft_config=peft_config if case.lora else None,
        layout=Layout(note="padded") if case.padded else None,
    )
    if case.padded != (trainer.layout.way is None):
        raise SystemExit(f"{case.name}: {trainer.layout.note}")
    trainer.train()
    return stop_measuring(baseline)


def trainer_class(case: Case) -> Callable[..., PreferenceTrainer]:
    """The method's trainer, complete but for what all trainers take."""
    if not case.samples:
        return partial(GPOTrainer, settings=GPOSettings(name="gpo"))
    regularizer = Regularizer(num_prompts=case.samples, max_new_tokens=case.length // 2)
    prompts = Dataset.from_list(random_pairs(case, case.samples)).select_columns(["row_id", "prompt_ids"])
    settings = SoftSettings(name="soft", regularizer=regularizer)
    return partial(SoftTrainer, settings=settings, sampling=SamplingPrompts(prompts, case.length // 2))


def random_pairs(case: Case, count: int) -> list[dict[str, Any]]:
    """Pairs of random tokens: prompt + chosen are `case.length` tokens, the rejected response is 16 shorter."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(3, 30000) for _ in range(length)]

    half = case.length // 2
    return [
        {
            "row_id": str(number),
            "prompt_ids": tokens(half),
            "response_ids": [tokens(case.length - half), tokens(half - 16)],
            "ranks": [0, 1],
        }
        for number in range(count)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """For its padding token; the pairs are tokens already."""
    words = models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def start_measuring() -> int:
    """Forget the peak so far (imports); returns bytes in use."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    return status_bytes("VmRSS")


def stop_measuring(baseline: int) -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else status_bytes("VmHWM") - baseline


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(case: Case, allocator: dict[str, str]) -> int:
    """Bytes, measured in a fresh process with these settings of the allocator."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case))]
    environment = {**os.environ, **allocator}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-3000:]}")
    return int(done.stdout.split()[-1])


def run_case(case: Case) -> dict[str, Any]:
    """Estimate here, measure elsewhere."""
    expected = estimate(case)
    resident = measure(case, {})
    alive = resident if DEVICE == "cuda" else measure(case, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    return {
        "case": case.name,
        **asdict(case),
        "parameters": expected.parameters,
        "trainable_parameters": expected.trainable_parameters,
        "method": expected.method,
        "phase": expected.phase,
        "parts_bytes": expected.parts,
        "estimated_alive_bytes": expected.alive,
        "alive_bytes": alive,
        "ratio_to_alive": round(expected.alive / alive, 3),
        "estimated_bytes": expected.total,
        "resident_bytes": resident,
        "ratio_to_resident": round(expected.total / resident, 3),
    }


def machine() -> dict[str, Any]:
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpu_lines if "model name" in line), platform.machine())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    libc = " ".join(platform.libc_ver())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        **gpu,
        "libc": libc,
        "python": platform.python_version(),
        **versions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | parameters | estimate | resident | ratio | estimate, alive | alive | ratio | estimate by part |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        parts = sorted(row["parts_bytes"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{part} {format_bytes(size)}" for part, size in parts if size >= 2**20)
        total, resident, expected, alive = (
            format_bytes(row[name])
            for name in ("estimated_bytes", "resident_bytes", "estimated_alive_bytes", "alive_bytes")
        )
        lines.append(
            f"| {row['case']} | {row['parameters'] / 1e6:.0f}M | {total} | {resident} | "
            f"{row['ratio_to_resident']:.2f} | {expected} | {alive} | {row['ratio_to_alive']:.2f} | {shown} |"
        )
    return "\n".join(lines)


CPU_MEASURE = """Resident: rise of the process's peak resident memory (VmHWM) over its resident memory after
the imports, with glibc's allocator as it is, which keeps part of what is freed; the estimate adds 15 % for that,
a share set after seeing such cases of TRL's trainer, and not changed since.
Alive: the same, glibc told to return every freed tensor to the system at once (MALLOC_MMAP_THRESHOLD_=65536)."""

CUDA_MEASURE = "Resident and alive: peak of `torch.cuda.max_memory_allocated`."


def report(rows: list[dict[str, Any]]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    verdicts = f"{verdict(rows, 'resident')} {verdict(rows, 'alive')}"
    return f"""# Memory: estimated and measured

`python benchmarks/memory.py`; {facts}.

Random models, prefopt's `{GPOTrainer.__name__}`, two steps, one process per case; float32 unless the case says bf16
(autocast), fused AdamW unless it names another. `4x512` is 4 pairs of a prompt of 256 tokens and responses of 256
and 240. Batches are packed and reference scores are known, unless the case says padded or reference-pass.
`soft-16` is `{SoftTrainer.__name__}` with the KL to the reference on 16 samples, half prompt, half response.
The estimate comes from the configuration alone, within seconds. {CUDA_MEASURE if DEVICE == "cuda" else CPU_MEASURE}

Ratio = estimate / measured. {verdicts}

{table(rows)}
"""


def verdict(rows: list[dict[str, Any]], measure: str) -> str:
    ratios = {row["case"]: row[f"ratio_to_{measure}"] for row in rows}
    spread = f"Against {measure} memory: {min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
    outside = [case for case, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE]
    return f"{spread}, " + (f"outside 25 %: {', '.join(outside)}." if outside else "every case within 25 %.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "only", nargs="?", default="", help="only cases whose name contains this; writes nothing"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(train(Case(**json.loads(arguments.measure)), folder))
        return
    rows = []
    for case in CASES:
        if arguments.only in case.name:
            rows.append(run_case(case))
            print(
                f"{case.name}: {rows[-1]['ratio_to_alive']:.2f}, {rows[-1]['ratio_to_resident']:.2f}",
                flush=True,
            )
    print(report(rows))
    if not arguments.only:
        write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.md").write_text(report(rows))
    facts = {"machine": machine(), "cases": rows}
    (RESULTS / "memory.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
