"""How much faster is a training step of prefopt than one of TRL's DPOTrainer, and does it do the same work?

    python -m benchmarks.throughput                  # writes benchmarks/results/throughput.{md,json}
    python -m benchmarks.throughput --end-to-end     # whole runs of both command lines as well
    python -m benchmarks.throughput --quick          # a tiny model and few steps, to see that it runs
    python -m benchmarks.throughput --join A.json B.json    # one report of what several runs measured
    python -m benchmarks.throughput --device cuda --dtype bfloat16 --hidden 896 --intermediate 4864 --layers 24 \\
        --heads 14 --kv-heads 2 --vocabulary 151936 --sets length-512 length-2048 length-4096 --batches 8
    ... --lora-rank 16 --bits 4                      # the same with QLoRA

Three trainers take turns on the same batches, from the same weights: prefopt with reference scores from its cache;
TRL with reference scores computed before training; TRL as it comes, with a reference pass in every step. Sets of pairs:
`hh` (human pairs, cut at --max-length), `even-N` (prompts of 2 to 4 random words, all responses of N tokens: nothing
to save), `length-N` (random words in the human pairs' proportions, scaled from --max-length to N tokens).
"""

import argparse
import contextlib
import ctypes
import json
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# One trainer's idle threads must not spin while another's work; prefopt's command line sets it too.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import datasets
import torch

from benchmarks.throughput_peers import PEERS
from benchmarks.throughput_processes import MEGABYTE, end_to_end, peak_memory
from benchmarks.throughput_report import progress_line, report
from benchmarks.throughput_steps import measure, pairs_needed
from benchmarks.throughput_subject import (
    SIDES,
    Subject,
    build,
    pair_set,
    peak_flops,
    read_rows,
    reference_scores,
)
from prefopt_cli.runs import environment

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "hh_helpful_harmless.jsonl.gz"

QUICK = {
    "hidden": 32,
    "intermediate": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 2,
    "vocabulary": 512,
    "batches": [2],
    "even_batches": [2],
    "rounds": 3,
    "warmup": 1,
    "whole_batch": 2,
    "steps": 10,
    "repeats": 1,
}
M_ARENA_MAX = -8  # malloc.h
MATRIX = {"cpu": 2048, "cuda": 8192}


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(DATA), help="JSON lines of prompt, chosen, rejected")
    parser.add_argument("--sets", nargs="*", default=["hh", "even-24", "even-96"])
    parser.add_argument("--batches", nargs="*", type=int, default=[4, 8, 16])
    parser.add_argument("--even-batches", nargs="*", type=int, default=[8], help="for the even-N sets")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--memory-batch", type=int, default=8, help="0: no measurement of memory")
    parser.add_argument("--end-to-end", action="store_true", help="whole runs as well")
    parser.add_argument("--whole-peers", nargs="*", default=list(PEERS), help="whose whole runs")
    parser.add_argument("--whole-batch", type=int, default=8, help="pairs a step of a whole run")
    parser.add_argument("--steps", type=int, default=100, help="of a whole run")
    parser.add_argument("--repeats", type=int, default=2, help="of the whole runs")
    for each in fields(Subject):
        option = f"--{each.name.replace('_', '-')}"
        if each.type is bool:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=each.type, default=each.default)
    parser.add_argument(
        "--join", nargs="*", help="measure nothing; results of runs that differ in --sets or --batches"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--print-only", action="store_true", help="write no files")
    parser.add_argument("--output", default=str(HERE / "results"), help="folder of the results")
    options = parser.parse_args(given)
    if options.quick:
        vars(options).update(QUICK)
    return options


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements."""
    subject = Subject(**{each.name: getattr(options, each.name) for each in fields(Subject)})
    human = read_rows(Path(options.data))
    lengths = [int(name.partition("-")[2]) for name in options.sets if name.startswith(("length-", "even-"))]
    texts = [row["prompt"] + row[side] for row in human for side in SIDES]
    build(folder, subject, texts, max([subject.max_length, *lengths]) + 8)
    matrix = 256 if options.quick else MATRIX[subject.device]
    facts: dict[str, Any] = {
        "subject": asdict(subject),
        "options": {
            name: value
            for name, value in vars(options).items()
            if name not in ("data", "output", "print_only")
        },
        "versions": environment.versions(),
        "machine": {**environment.machine(), "cores": os.cpu_count()},
        "matrix": matrix,
        "peak_flops_per_second": peak_flops(subject, matrix),
        "configurations": [],
        "scoring": [],
        "memory": [],
        "end_to_end": [],
    }
    for name in options.sets:
        batches = options.even_batches if name.startswith("even-") else options.batches
        if not batches:
            continue
        count = pairs_needed(max(batches), options.rounds, options.warmup)
        pairs = pair_set(folder, name, human, subject, count)
        scores, seconds = reference_scores(folder, subject, pairs.tokens)
        facts["scoring"].append({"pairs": name, "count": count, "seconds": seconds})
        for batch in batches:
            figures = measure(
                subject, folder, pairs, scores, batch=batch, rounds=options.rounds, warmup=options.warmup
            )
            facts["configurations"].append(figures)
            print(progress_line(figures), flush=True)
    if options.memory_batch:
        pairs = pair_set(folder, options.sets[0], human, subject, 4 * options.memory_batch)
        for row in peak_memory(subject, folder, pairs, options.memory_batch):
            facts["memory"].append(row)
            print(f"memory, {row['peer']}: {row['bytes'] / MEGABYTE:.0f} MB", flush=True)
    if options.end_to_end:
        batch = options.whole_batch
        pairs = pair_set(folder, options.sets[0], human, subject, batch * options.steps)
        for row in end_to_end(
            subject,
            folder,
            pairs,
            peers=options.whole_peers,
            batch=batch,
            steps=options.steps,
            repeats=options.repeats,
        ):
            facts["end_to_end"].append({"pairs": len(pairs.rows), "batch": batch, **row})
            print(f"whole run, {row['peer']}, {row['caches']}: {row['seconds']:.1f} s", flush=True)
    return facts


def joined(files: list[str]) -> dict[str, Any]:
    """The measurements of several runs of the same subject as one."""
    first, *others = (json.loads(Path(file).read_text()) for file in files)
    for facts in others:
        if any(facts[name] != first[name] for name in ("subject", "versions", "matrix")):
            raise SystemExit("--join: the runs differ in subject or versions")
        for name in ("configurations", "scoring", "memory", "end_to_end"):
            first[name] += facts[name]
        if facts["end_to_end"]:
            first["options"].update({name: facts["options"][name] for name in ("steps", "repeats")})
    return first


def share_one_arena() -> None:
    """Let glibc give threads memory as it gives it to a main thread, where a trainer usually runs.

    In a thread of its own, large tensors would be mapped anew for every use.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    share_one_arena()
    options = parse(given)
    datasets.disable_progress_bars()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no GPU")
    if options.join:
        facts = joined(options.join)
    else:
        with tempfile.TemporaryDirectory() as folder:
            facts = run(options, Path(folder))
    text = report(facts)
    print(text)
    if not options.print_only:
        results = Path(options.output)
        results.mkdir(parents=True, exist_ok=True)
        (results / "throughput.md").write_text(text)
        (results / "throughput.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


if __name__ == "__main__":
    main()
