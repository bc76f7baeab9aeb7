"""`prefopt eval` on all of HH's pairs: how long it takes, and how its scoring compares with plain transformers.

    python -m benchmarks.evaluation_hh     # reads ../shared, writes benchmarks/results/evaluation-hh.{md,json}

The whole command (data, tokens, scores of policy, figures with intervals, report) runs with an empty cache, then with a
full one. Its log-probabilities are compared pair by pair with those of plain transformers on padded batches, which run
in turn with prefopt's scoring in one process: batches of 8 pairs in the data's order, as a trainer's evaluation has
them, and sorted by length, the best that padding can do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line sets it

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from benchmarks.tables import table
from prefopt_cli.evaluation.evaluate import scores_of
from prefopt_cli.evaluation.held_out import chosen_sets, held_out_sets
from prefopt_cli.evaluation.targets import Target, find_target
from prefopt_cli.runs import environment
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
PAIRS_OF_A_BATCH = 8

Figures = dict[str, Any]


def whole_command(options: argparse.Namespace, folder: Path) -> Figures:
    """Seconds of the command as a user starts it, cold and warm, and its summary."""
    command = [sys.executable, "-m", "prefopt_cli", "eval", options.model, "--data", options.data]
    command += ["--output", str(folder / "eval"), "--json"]
    seconds = []
    for _ in ("cold", "warm"):
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env={**os.environ, "PREFOPT_CACHE": str(folder / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
    return {"cold": seconds[0], "warm": seconds[1], "summary": json.loads(done.stdout)}


def packed(target: Target, rows: Dataset) -> tuple[float, list[list[float]]]:
    """Seconds and log-probabilities (nats) of prefopt's scoring with an empty cache, loading included."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFOPT_CACHE"] = folder
        start = time.perf_counter()
        found = scores_of(target.source, target, {"all": rows}, Silent(), "the policy", lambda: False)
        seconds = time.perf_counter() - start
        assert found.found.computed == found.found.responses
    return seconds, found.logps["all"]


def padded(
    options: argparse.Namespace, rows: Dataset, *, by_length: bool
) -> tuple[float, list[list[float]], int]:
    """Seconds, log-probabilities (nats) and tokens with padding of plain transformers, loading included."""
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    prompts, responses = rows["prompt_ids"][:], rows["response_ids"][:]
    order = list(range(len(rows)))
    if by_length:
        order.sort(key=lambda row: len(prompts[row]) + max(map(len, responses[row])))
    found: list[list[float]] = [[] for _ in order]
    tokens = 0
    for first in range(0, len(order), PAIRS_OF_A_BATCH):
        batch = [(row, side) for row in order[first : first + PAIRS_OF_A_BATCH] for side in (0, 1)]
        texts = [prompts[row] + responses[row][side] for row, side in batch]
        width = max(map(len, texts))
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        attended = torch.zeros_like(ids)
        scored = torch.zeros_like(ids)
        for place, ((row, _), text) in enumerate(zip(batch, texts, strict=True)):
            ids[place, : len(text)] = torch.tensor(text)
            attended[place, : len(text)] = 1
            scored[place, len(prompts[row]) : len(text)] = 1
        with torch.no_grad():
            logps = model(ids, attention_mask=attended).logits[:, :-1].log_softmax(-1)
        own = logps.gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]
        for (row, _), value in zip(batch, own.sum(1).tolist(), strict=True):
            found[row].append(value)
        tokens += ids.numel()
    return time.perf_counter() - start, found, tokens


def report(facts: Figures) -> str:
    """Markdown."""
    summary = facts["summary"]
    (figures,) = summary["sets"].values()
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in figures["dropped"].items())
    lines = [
        "# `prefopt eval` on HH-RLHF",
        "",
        f"{figures['rows'] + sum(figures['dropped'].values()):,} rows on {facts['model']} on {facts['threads']} CPU "
        f"threads: {figures['pairs']:,} pairs scored, the others do not fit its context of 512 ({dropped}). Median of "
        f"{len(facts['cold'])}. Made by `python -m benchmarks.evaluation_hh`.",
        "",
        *table(
            ["the whole command", "seconds, all"],
            [
                ["empty cache", _seconds(facts["cold"])],
                ["full cache", _seconds(facts["warm"])],
            ],
        ),
        *table(
            ["scoring alone, in turn", "tokens", "seconds, all", "time, prefopt = 1"],
            [
                ["prefopt, packed", f"{facts['tokens']:,}", _seconds(facts["packed"]), "1"],
                *(
                    [
                        title,
                        f"{facts[f'{key}_tokens']:,}",
                        _seconds(facts[key]),
                        _ratio(facts[key], facts["packed"]),
                    ]
                    for key, title in (
                        ("padded", "transformers, padded, 8 pairs in the data's order"),
                        ("sorted", "transformers, padded, 8 pairs by length"),
                    )
                ),
            ],
        ),
        f"Log-probabilities differ from plain transformers by at most {facts['largest']:.1e} nats a response; "
        f"{facts['same']:,} of {figures['pairs']:,} pairs are ordered alike, accuracy {facts['accuracy']:.4%} "
        f"and {facts['plain_accuracy']:.4%}.",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}.",
        "",
    ]
    return "\n".join(lines)


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({', '.join(f'{each:.1f}' for each in values)})"


def _ratio(theirs: list[float], ours: list[float]) -> str:
    """The median of the paired ratios."""
    return f"{statistics.median(a / b for a, b in zip(theirs, ours, strict=True)):.2f}"


def main() -> None:
    """Run all, print the tables, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(SHARED / "data" / "hh_helpful_harmless.jsonl.gz"))
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    target = find_target(options.model, Silent(), RunFinder())
    settings = chosen_sets(target.recipe.dataset, [options.data], split=None, dimensions=[])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFOPT_CACHE"] = folder
        (held_out,) = held_out_sets(target, settings, Silent()).values()
    rows = held_out.tokens
    facts: Figures = {name: [] for name in ("cold", "warm", "packed", "padded", "sorted")}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            whole = whole_command(options, Path(folder))
        seconds, ours = packed(target, rows)
        in_order, theirs, facts["padded_tokens"] = padded(options, rows, by_length=False)
        by_length, _, facts["sorted_tokens"] = padded(options, rows, by_length=True)
        times = (whole["cold"], whole["warm"], seconds, in_order, by_length)
        for name, value in zip(("cold", "warm", "packed", "padded", "sorted"), times, strict=True):
            facts[name].append(round(value, 2))
        print(repeat, facts, flush=True)
    own, plain = (torch.tensor(each, dtype=torch.float64) for each in (ours, theirs))
    won = [each[:, 0] > each[:, 1] for each in (own, plain)]
    facts |= {
        "model": Path(options.model).name,
        "threads": torch.get_num_threads(),
        "summary": {name: whole["summary"][name] for name in ("sets", "scores")},
        "tokens": sum(
            len(prompt) + sum(map(len, listed))
            for prompt, listed in zip(rows["prompt_ids"][:], rows["response_ids"][:], strict=True)
        ),
        "largest": float((own - plain).abs().max()),
        "same": int((won[0] == won[1]).sum()),
        "accuracy": float(won[0].double().mean()),
        "plain_accuracy": float(won[1].double().mean()),
        "versions": environment.versions(),
    }
    text = report(facts)
    print(text)
    if not options.print_only:
        results = HERE / "results"
        (results / "evaluation-hh.md").write_text(text)
        (results / "evaluation-hh.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
