"""Does `estimate_memory` say what each of several processes holds? Run two of them over gloo and compare.

    python benchmarks/memory_engines.py            # all cases, writes benchmarks/results/memory-engines.{md,json}
    python benchmarks/memory_engines.py fsdp       # only cases whose name contains this, writes nothing

Each case trains the random model `llama-50m` of `benchmarks/memory.py` for three steps in processes of their own, as
`prefopt train` does. Counted in the first of them: the bytes of the local parts of weights and optimizer after the
steps, and of the gradients when the optimizer is about to step; and the peak of its resident memory in the last step
(Linux, VmHWM) over that after the imports, glibc told to return every freed tensor to the system at once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import DPOConfig

from benchmarks.memory import (
    RESULTS,
    Case,
    build,
    machine,
    random_pairs,
    start_measuring,
    status_bytes,
    tokenizer,
    trainer_class,
)
from prefopt_cli.launch.engine_variables import chosen, engine_variables
from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.scoring.choice import packed_layouts
from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.memory import MemoryEstimate, Sharing, estimate_memory, format_bytes
from prefopt_cli.training.trainer import REFERENCE_COLUMNS

PROCESSES, STEPS, PAIRS = 2, 3, 2
COUNTED = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class EngineCase:
    """One row of the table."""

    engine: str
    options: dict[str, bool] = field(default_factory=dict)
    """Settings of `launch` that are not the default."""
    lora: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    sync_each_batch: bool = False
    processes: int = PROCESSES

    @property
    def name(self) -> str:
        words = [self.engine, "lora" if self.lora else "full"]
        words += [f"{key}={str(value).lower()}" for key, value in self.options.items()]
        words += ["checkpointing"] * self.checkpointing
        words += [f"accumulation-{self.accumulation}"] * (self.accumulation > 1)
        words += ["sync_each_batch"] * self.sync_each_batch
        return " ".join(words)

    @property
    def model(self) -> Case:
        return Case("llama-50m", lora=self.lora, pairs=PAIRS)


CASES = [
    EngineCase("ddp"),
    EngineCase("ddp", lora=True),
    EngineCase("ddp", accumulation=2),
    EngineCase("fsdp"),
    EngineCase("fsdp", checkpointing=True),
    EngineCase("fsdp", {"reshard_after_forward": False}),
    EngineCase("fsdp", accumulation=2),
    EngineCase("fsdp", accumulation=2, sync_each_batch=True),
    EngineCase("fsdp", lora=True),
]


def estimate(case: EngineCase) -> MemoryEstimate:
    with torch.device("meta"):
        model = build(case.model)
    rows = random_pairs(case.model, PAIRS)
    return estimate_memory(
        model,
        [Example(row["prompt_ids"], tuple(row["response_ids"])) for row in rows],
        packed_layouts(plain_model(model), "cpu")[0],
        reference="none",
        gradient_checkpointing=case.checkpointing,
        gradient_accumulation_steps=case.accumulation,
        sharing=Sharing(
            case.engine,  # type: ignore[arg-type]
            case.processes,
            sync_each_batch=case.sync_each_batch,
            **case.options,
        ),
    )


class Counting(TrainerCallback):
    """Bytes that this process holds, and its peak in the last step."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS - 1:
            start_measuring()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.bytes["gradients"] = local_bytes(
            each.grad for each in model.parameters() if each.grad is not None
        )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.bytes["weights"] = local_bytes([*model.parameters(), *model.buffers()])
        states = [value for each in optimizer.state.values() for value in each.values()]
        self.bytes["optimizer"] = local_bytes(
            value for value in states if torch.is_tensor(value) and value.ndim
        )


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Of what this process has of them; FSDP's shards of gradients lie in one piece of memory for each layer."""
    local = (each.to_local() if isinstance(each, DTensor) else each for each in tensors)
    storages = (each.untyped_storage() for each in local)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def train(case: EngineCase, folder: str) -> dict[str, int]:
    """Bytes by part, and at the peak."""
    baseline = start_measuring()
    policy = build(case.model)
    peft_config = policy.peft_config["default"] if case.lora else None
    dataset = Dataset.from_list(random_pairs(case.model, STEPS * PAIRS * case.accumulation * case.processes))
    for column in REFERENCE_COLUMNS:
        dataset = dataset.add_column(column, [-500.0] * len(dataset))
    counting = Counting()
    trainer = trainer_class(case.model)(
        model=policy.unload() if case.lora else policy,
        ref_model=None,
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            gradient_accumulation_steps=case.accumulation,
            accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": case.sync_each_batch}},
            max_steps=STEPS,
            max_length=None,
            remove_unused_columns=False,
            bf16=False,
            gradient_checkpointing=case.checkpointing,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        eval_dataset={},
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=[counting],
    )
    del policy
    trainer.train()
    return {**counting.bytes, "peak": status_bytes("VmHWM") - baseline}


def measure(case: EngineCase) -> dict[str, int]:
    """`train` in processes of their own; what the first of them counted."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counted.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", str(case.processes)),
            *(__file__, "--measure", json.dumps(asdict(case)), "--result", str(result)),
        ]
        settings = LaunchSettings(engine=case.engine, processes=case.processes, **case.options)  # type: ignore[arg-type]
        environment = {
            **os.environ,
            **chosen(case.engine),
            **engine_variables(settings),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{case.name} failed:\n{done.stderr[-5000:]}")
        counted: dict[str, int] = json.loads(result.read_text())
        return counted


def run_case(case: EngineCase) -> dict[str, Any]:
    """Estimate here, measure elsewhere."""
    expected, counted = estimate(case), measure(case)
    trained = 4 * expected.trainable_parameters
    share = 1 if case.engine == "ddp" else case.processes
    parts = {
        "weights": expected.parts["weights"],
        "gradients": trained // share,
        "optimizer": expected.parts["optimizer"],
    }
    return {
        "case": case.name,
        **asdict(case),
        "parts_bytes": expected.parts,
        "estimated": {**parts, "peak": expected.alive},
        "counted": counted,
        "ratio": {
            name: round(size / counted[name], 3) for name, size in {**parts, "peak": expected.alive}.items()
        },
    }


def report(rows: list[dict[str, Any]]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    ratios = {name: [row["ratio"][name] for row in rows] for name in (*COUNTED, "peak")}
    spread = "; ".join(f"{name} {min(each):.2f} to {max(each):.2f}" for name, each in ratios.items())
    return f"""# Memory of one of several processes: estimated and measured

`python benchmarks/memory_engines.py`; {facts}.

The random model llama-50m (56 million numbers, float32, fused AdamW), {PROCESSES} processes over gloo, batches of
{PAIRS} pairs of 256 tokens. Weights, gradients and optimizer: bytes of the local tensors of the first process. Peak:
of its resident memory in the third step, over that after the imports, glibc told to return every freed tensor to the
system at once; what gloo and the threads of autograd take for themselves is in it.

Ratio = estimate / measured: {spread}.

{table(rows)}
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Estimate and measurement side by side."""
    names = (*COUNTED, "peak")
    lines = [
        "| case | " + " | ".join(f"{name}, estimate | measured" for name in names) + " | ratio of peaks |",
        "|---|" + "---:|" * (2 * len(names) + 1),
    ]
    for row in rows:
        cells = [format_bytes(row[kind][name]) for name in names for kind in ("estimated", "counted")]
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {row['ratio']['peak']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "only", nargs="?", default="", help="only cases whose name contains this; writes nothing"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            counted = train(EngineCase(**json.loads(arguments.measure)), folder)
        if os.environ["RANK"] == "0":
            arguments.result.write_text(json.dumps(counted))
        return
    rows = []
    for case in CASES:
        if arguments.only in case.name:
            rows.append(run_case(case))
            print(case.name, rows[-1]["ratio"], flush=True)
    print(report(rows))
    if not arguments.only:
        (RESULTS / "memory-engines.md").write_text(report(rows))
        facts = {"machine": machine(), "cases": rows}
        (RESULTS / "memory-engines.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
