"""Helpful, then harmless on human preferences: what the second stage leaves of the first, with lambda and without.

    python -m benchmarks.sequential_hh     # reads ../shared, writes benchmarks/results/sequential-hh.{md,json}

recipes/chain-hh.yaml with the 260-thousand-parameter stories260K, once for every lambda: one epoch a stage of full
fine-tuning, the same seed. Held out are the last rows of each dimension, of prompts that no stage trains on. A model
this small knows nothing of the subject; the table shows the machinery, not what the method can do.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from benchmarks.tables import table
from prefopt_cli.chain.loader import load_chain
from prefopt_cli.chain.plan import make_plan
from prefopt_cli.chain.run import run_plan
from prefopt_cli.runs import environment
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "chain-hh.yaml"
SHARED = HERE.parent.parent / "shared"
SLICES = {"helpful": (":45%", "45%:50%"), "harmless": ("50%:95%", "95%:")}
"""Of the file, whose rows are sorted by dimension: to train on, and held out."""
ORDER = ("helpful", "harmless")

Figures = dict[str, Any]


def one_chain(value: float, options: argparse.Namespace, folder: Path) -> Figures:
    """Train both stages and return the retention table."""

    def source(name: str, part: int) -> str:
        return (
            f"{{source: {options.data}, where: {{dimension: {name}}}, split: 'train[{SLICES[name][part]}]'}}"
        )

    first, second = ORDER
    overrides = [
        f"model.name_or_path={options.model}",
        "dataset.max_length=512",
        f"dataset.eval={{{', '.join(f'{name}: {source(name, 1)}' for name in SLICES)}}}",
        f"stages=[{{dimension: {first}, dataset: {{train: {source(first, 0)}}}}}, "
        f"{{dimension: {second}, dataset: {{train: {source(second, 0)}}}, lambdas: {{{first}: {value}}}}}]",
        f"training={{per_device_train_batch_size: 8, learning_rate: {options.learning_rate}, warmup_steps: 20, "
        "gradient_checkpointing: false, use_cpu: true, eval_strategy: 'no', save_strategy: 'no', seed: 0}",
        f"output_dir={folder}",
    ]
    chain, runs, reporter = load_chain(RECIPE, overrides), RunFinder(), Silent()
    plan = make_plan(chain, reporter=reporter, runs=runs)
    outcome = run_plan(plan, reporter=reporter, runs=runs, told=lambda *_: None)
    found: Figures = outcome.to_dict()["retention"]
    return found


def report(facts: Figures, rows: list[Figures]) -> str:
    """Markdown."""

    def figure(found: Figures, digits: int, scale: float = 1.0, sign: str = "") -> str:
        value, low, high = (scale * found[name] for name in ("value", "low", "high"))
        return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    lines = [
        "# Helpful and harmless, one after the other, on HH-RLHF",
        "",
        f"recipes/chain-hh.yaml with {facts['model']}, learning rate {facts['learning_rate']:g}; one epoch a stage. "
        "Accuracy is the share of held-out pairs whose chosen response gained more than the rejected one since the "
        "base (50 % by definition there), margin the mean of that difference in nats; 95 % intervals, bootstrap over "
        "prompts. Made by `python -m benchmarks.sequential_hh`.",
        "",
    ]
    for row in rows:
        found = row["retention"]
        lines += [f"## lambda {row['lambda']:g}", ""]
        cells = []
        for stage in found["stages"][1:]:
            cell = [stage["name"]]
            for name in SLICES:
                results = stage["results"][name]
                cell += [figure(results["accuracy"], 1, 100), figure(results["margin"], 2)]
            cells.append(cell)
        head = [f"{name}, {what}" for name in SLICES for what in ("accuracy, %", "margin")]
        lines += table(["after stage", *head], cells)
        change = found["forgetting"][ORDER[0]]
        lines += [
            f"Change of {ORDER[0]} by the second stage: accuracy {figure(change['accuracy'], 1, 100, '+')} points, "
            f"margin {figure(change['margin'], 2, 1, '+')} nats.",
            "",
        ]
    pairs = ", ".join(f"{found['pairs']} {name}" for name, found in rows[0]["retention"]["sets"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join([*lines, f"Held-out pairs: {pairs}. Versions: {versions}.", ""])


def main() -> None:
    """Run all, print the tables, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(SHARED / "data" / "hh_helpful_harmless.jsonl.gz"))
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lambdas", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    rows = []
    for value in options.lambdas:
        with tempfile.TemporaryDirectory() as folder:
            found = one_chain(value, options, Path(folder) / "chain")
        for stage in found["stages"]:
            stage.pop("run")  # a folder that is gone
        rows.append({"lambda": value, "retention": found})
        print(json.dumps(rows[-1]), flush=True)
    facts = {
        "model": Path(options.model).name,
        "learning_rate": options.learning_rate,
        "versions": environment.versions(),
    }
    text = report(facts, rows)
    print(text)
    if not options.print_only:
        results = HERE / "results"
        (results / "sequential-hh.md").write_text(text)
        (results / "sequential-hh.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
