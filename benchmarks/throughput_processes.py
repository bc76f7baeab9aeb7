"""Peak memory of one trainer in a process of its own, and whole runs from the command line.

python -m benchmarks.throughput_processes JSON     # started by benchmarks.throughput: prints bytes
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.throughput_peers import LOGGING_STEPS, OURS, PEERS, PLAIN, PRECOMPUTED, build_trainer, longest
from benchmarks.throughput_subject import PairSet, Subject, read_rows, tokenize
from prefopt_cli.runs.metrics import read

ROOT = Path(__file__).resolve().parent.parent
MEMORY_STEPS = 3
MEGABYTE = 2**20


def peak_memory(subject: Subject, folder: Path, pairs: PairSet, batch: int) -> Iterator[dict[str, Any]]:
    """Bytes of every peer, for a few steps at this batch size; the policy is its own reference at the start."""
    scores = {column: [0.0] * len(pairs.rows) for column in ("ref_chosen_logps", "ref_rejected_logps")}
    for name in PEERS:
        order = {
            "name": name,
            "subject": asdict(subject),
            "folder": str(folder),
            "pairs": [pairs.name, str(pairs.path)],
            "batch": batch,
            "longest": longest(pairs),
            "scores": scores,
        }
        done = _run([sys.executable, "-m", "benchmarks.throughput_processes", "-"], json.dumps(order))
        yield {"peer": name, "pairs": pairs.name, "batch": batch, "bytes": int(done.stdout.split()[-1])}


def _peak_here(order: dict[str, Any]) -> int:
    """In the child: rise of the peak resident memory over what imports and data take; on CUDA the peak allocated."""
    subject, folder = Subject(**order["subject"]), Path(order["folder"])
    name, path = order["pairs"]
    tokens = tokenize(Path(path), folder, order["longest"])
    pairs = PairSet(name, Path(path), read_rows(Path(path)), tokens)
    if subject.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        baseline = status_bytes("VmRSS")
    trainer = build_trainer(
        order["name"],
        subject,
        folder,
        pairs,
        order["scores"],
        batch=order["batch"],
        steps=MEMORY_STEPS,
        reference="model",
    )
    trainer.train()
    if subject.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM") - baseline


def status_bytes(field: str) -> int:
    """A figure of this process, as Linux has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def end_to_end(
    subject: Subject,
    folder: Path,
    pairs: PairSet,
    *,
    peers: Sequence[str],
    batch: int,
    steps: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """`prefopt train` and `trl dpo` as whole processes, in turn; each repeat with caches first empty, then filled.

    TRL as it comes keeps nothing that a second run would gain from, so it has no second run.
    """
    for repeat in range(repeats):
        place = folder / f"end-to-end-{repeat}"
        for caches in ("cold", "warm"):
            for name in peers:
                if caches == "warm" and name == PLAIN:
                    continue
                out = place / f"{caches}-{name}"
                out.mkdir(parents=True)
                command = _command(name, subject, folder, pairs, out, batch, steps)
                environment = {
                    # Of its own for every peer, so that none profits from another's.
                    "PREFOPT_CACHE": str(place / f"cache-{name}"),
                    "HF_HOME": str(place / f"cache-{name}"),
                }
                start, processor = time.perf_counter(), _processor_seconds()
                done = _run(command, environment=environment)
                seconds = time.perf_counter() - start
                yield {
                    "peer": name,
                    "caches": caches,
                    "repeat": repeat,
                    "seconds": seconds,
                    "processor_seconds": _processor_seconds() - processor,
                    "last_loss": _last_loss(name, out, done.stdout),
                }


def _processor_seconds() -> float:
    """User and system time of all finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(
    name: str, subject: Subject, folder: Path, pairs: PairSet, out: Path, batch: int, steps: int
) -> list[str]:
    """Writes the recipe or configuration; returns what starts the run."""
    training = {
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": subject.learning_rate,
        "logging_steps": LOGGING_STEPS,
        "gradient_checkpointing": subject.gradient_checkpointing,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "bf16": subject.dtype != "float32",
        "use_cpu": subject.device == "cpu",
    }
    dtype = "bfloat16" if subject.dtype == "bfloat16" else "float32"
    path = out / "run.yaml"
    if name == OURS:
        recipe = {
            "model": {"name_or_path": str(folder / "model"), "dtype": dtype},
            "dataset": {
                "train": str(pairs.path),
                "max_length": longest(pairs),
                "on_overflow": "truncate_response",
                "shuffle": False,
            },
            "method": {"name": "gpo", "loss": "logistic", "beta": 0.1},
            "training": training,
            "output_dir": str(out / "run"),
        }
        path.write_text(yaml.safe_dump(recipe))
        return [sys.executable, "-m", "prefopt_cli", "train", str(path)]
    config = {
        "model_name_or_path": str(folder / "model"),
        "dtype": dtype,
        "dataset_name": str(pairs.path.parent),
        "max_length": longest(pairs),
        "precompute_ref_log_probs": name == PRECOMPUTED,
        "output_dir": str(out / "run"),
        **training,
    }
    path.write_text(yaml.safe_dump(config))
    return [str(Path(sys.executable).with_name("trl")), "dpo", "--config", str(path)]


def _last_loss(name: str, out: Path, output: str) -> float | None:
    """Of the last log, a mean over its steps; None where the run was too short for one."""
    if name == OURS:
        losses = [record["loss"] for record in read(out / "run" / "metrics.jsonl") if "loss" in record]
    else:
        losses = re.findall(r"'loss': *'?([0-9.e+-]+)", output)
    return float(losses[-1]) if losses else None


def _run(
    command: list[str], given: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    shared = {
        "HF_HUB_OFFLINE": "1",
        # `trl` starts accelerate, which would give the processor's arithmetic one thread where none are asked for.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # prefopt sets it for itself.
        "GOMP_SPINCOUNT": "2000",
    }
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **shared, **(environment or {})},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done


if __name__ == "__main__":
    print(_peak_here(json.load(sys.stdin)))
