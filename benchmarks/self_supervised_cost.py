"""What the preference-degree loss costs per step: plain gpo and self_supervised in turn, on the same pairs.

    python -m benchmarks.self_supervised_cost     # writes benchmarks/results/self-supervised-cost.{md,json}

Human pairs and policy are those of `benchmarks.throughput`: a random Llama of 14 million parameters. Whole `train()`
loops take turns step by step; the reference's scores are known, as they are in a run.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from datasets import Dataset

from benchmarks.tables import table
from benchmarks.throughput import DATA
from benchmarks.throughput_peers import own_arguments
from benchmarks.throughput_steps import RESAMPLES, Runner
from benchmarks.throughput_subject import Subject, build, load_policy, read_rows, tokenizer_of, write_rows
from prefopt_cli import data
from prefopt_cli.data.degrading import Degrading
from prefopt_cli.data.stopwords import find_stopwords
from prefopt_cli.recipe.schema import DatasetSettings, GPOSettings, SelfSupervisedSettings
from prefopt_cli.runs import environment
from prefopt_cli.training.gpo import GPOTrainer
from prefopt_cli.training.self_supervised import SelfSupervisedTrainer

RESULTS = Path(__file__).resolve().parent / "results"
ALIGN = {"name": "gpo", "loss": "logistic", "beta": 0.1}
PLAIN = "gpo alone"
VARIANTS: dict[str, dict[str, Any]] = {
    "levels_per_step 1, last state": {},
    "levels_per_step 1, mean state": {"pooling": "mean"},
    "levels_per_step 1, chosen only": {"apply_to": "chosen"},
    "levels_per_step 2": {"levels_per_step": 2},
    "levels_per_step 4 (all)": {"levels_per_step": 4},
}


def settings_of(variant: dict[str, Any]) -> SelfSupervisedSettings:
    return SelfSupervisedSettings(name="self_supervised", align=ALIGN, **variant)


def tokenized(path: Path, folder: Path, max_length: int, count: int) -> Dataset:
    """The first pairs that fit, with their degraded versions."""
    settings = DatasetSettings(train=[{"source": str(path)}], max_length=max_length)
    degrading = Degrading(find_stopwords("en"), levels=4)
    rows = data.tokenize(data.load(settings), tokenizer_of(folder), settings, degrading=degrading).train
    if len(rows) < count:
        raise SystemExit(f"Only {len(rows)} pairs fit, {count} are needed: lower --batch or --rounds.")
    rows = rows.select(range(count))
    zeros = [0.0] * count  # what the reference says does not change what a step costs
    return rows.add_column("ref_chosen_logps", zeros).add_column("ref_rejected_logps", zeros)


def runner(name: str, subject: Subject, folder: Path, rows: Dataset, batch: int, steps: int) -> Runner:
    align = GPOSettings(**ALIGN)
    if name == PLAIN:
        trainer, rows = (
            partial(GPOTrainer, settings=align),
            rows.remove_columns(["degraded_ids", "degraded_levels"]),
        )
    else:
        degrees = settings_of(VARIANTS[name])
        beside = SelfSupervisedTrainer.beside(GPOTrainer)
        trainer = partial(beside, settings=align, degrees=degrees)
        if degrees.apply_to == "chosen":
            rows = rows.map(_chosen_only)
    built = trainer(
        model=load_policy(folder, subject),
        ref_model=None,
        args=own_arguments(subject, folder, batch, steps),
        train_dataset=rows,
        eval_dataset={},
        processing_class=tokenizer_of(folder),
    )
    return Runner(name, built, subject.device)


def _chosen_only(row: dict[str, Any]) -> dict[str, Any]:
    return {name: [row[name][0], []] for name in ("degraded_ids", "degraded_levels")}


def measure(subject: Subject, folder: Path, rows: Dataset, batch: int, rounds: int, warmup: int) -> Any:
    """Ratio of times and of tokens, each variant's over plain gpo's on the same batch."""
    names = [PLAIN, *VARIANTS]
    runners = [runner(name, subject, folder, rows, batch, warmup + rounds + 1) for name in names]
    for each in runners:
        each.start()
    for _ in range(warmup + rounds + 1):
        for each in runners:
            each.turn()
    plain = runners[0].steps
    draw = np.random.default_rng(0)
    found = {}
    for each in runners:
        window = slice(warmup, warmup + rounds)
        ratios = np.array(each.steps.seconds[window]) / np.array(plain.seconds[window])
        medians = np.median(draw.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
        tokens = np.array(each.steps.policy_tokens[window]) / np.array(plain.policy_tokens[window])
        found[each.name] = {
            "median_seconds": float(np.median(each.steps.seconds[window])),
            "time": [float(np.median(ratios)), *np.quantile(medians, [0.025, 0.975]).tolist()],
            "tokens": float(np.mean(each.steps.policy_tokens[window])),
            "token_ratio": float(tokens.mean()),
        }
    return found


def report(found: dict[str, Any], subject: Subject, options: argparse.Namespace, versions: Any) -> str:
    lines = []
    for name, figures in found.items():
        median, low, high = figures["time"]
        lines.append(
            [
                name,
                f"{figures['tokens']:,.0f}",
                f"{figures['token_ratio']:.2f}",
                f"{figures['median_seconds']:.2f}",
                f"{median:.2f} [{low:.2f}, {high:.2f}]" if name != PLAIN else "1",
            ]
        )
    head = ["", "tokens a step", "times gpo's", "seconds a step", "times gpo's, 95 % interval"]
    return "\n".join(
        [
            "# What the preference-degree loss costs",
            "",
            f"Human pairs (HH) cut at {subject.max_length} tokens, {options.batch} a step, 4 levels, a random Llama of "
            f"{options.parameters / 1e6:.1f} million parameters on the CPU in {subject.dtype}, "
            f"{options.threads} threads. All rows take turns step by step on the same pairs ({options.rounds} rounds "
            "after a warm-up); ratios are medians of the paired ones. Made by "
            "`python -m benchmarks.self_supervised_cost`.",
            "",
            *table(head, lines),
            f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
            "",
        ]
    )


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(DATA), help="JSON lines of prompt, chosen, rejected")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    subject = replace(Subject(), max_length=512)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        human = read_rows(Path(options.data))
        texts = [text for row in human for text in row.values()]
        build(folder, subject, texts, subject.max_length)
        write_rows(folder / "pairs.jsonl", human)
        count = options.batch * (options.rounds + options.warmup + 3)
        rows = tokenized(folder / "pairs.jsonl", folder, subject.max_length, count)
        options.parameters = load_policy(folder, subject).num_parameters()
        options.threads = torch.get_num_threads()
        found = measure(subject, folder, rows, options.batch, options.rounds, options.warmup)
    versions = environment.versions()
    text = report(found, subject, options, versions)
    print(text)
    if options.print_only:
        return
    (RESULTS / "self-supervised-cost.md").write_text(text)
    record = {"versions": versions, "subject": asdict(subject), "batch": options.batch, "rows": found}
    (RESULTS / "self-supervised-cost.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
