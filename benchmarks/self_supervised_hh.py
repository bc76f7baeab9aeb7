"""What the classifier of self_supervised learns of human responses, level by level.

    python -m benchmarks.self_supervised_hh    # reads ../shared, writes benchmarks/results/self-supervised-hh.{md,json}

HH-RLHF (helpful and harmless), split by prompt into train and held-out; full fine-tuning of the 260-thousand-parameter
stories260K by DPO and the degree loss, the same seed and order of pairs for all. Held-out accuracy is over all levels
of all held-out responses that take part, intervals are 95 %, bootstrap over prompts. A classifier that always names the
commonest level scores that level's share.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.tables import table
from prefopt_cli.evaluation.statistics import mean_with_interval
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import environment
from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.degree_batches import DegreeCollator
from prefopt_cli.training.head_optimizer import saved_head
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
LEVELS = 4
BATCH = 16

RECIPE = """\
model: {{name_or_path: {model}}}
dataset:
  train: {data}
  holdout: 0.2
  max_length: 512
method:
  name: self_supervised
  align: {{name: gpo, loss: logistic, beta: 0.1}}
  levels: 4
  pooling: {pooling}
  ssl_coef: {ssl_coef}
training:
  per_device_train_batch_size: 8
  num_train_epochs: {epochs}
  learning_rate: {learning_rate}
  warmup_steps: 20
  logging_steps: 50
  eval_strategy: "no"
  save_strategy: epoch
  save_total_limit: 1
  gradient_checkpointing: false
  use_cpu: true
  seed: 0
output_dir: {out}
"""

VARIANTS = (
    {"pooling": "last", "ssl_coef": 0.1},
    {"pooling": "last", "ssl_coef": 1.0},
    {"pooling": "mean", "ssl_coef": 0.1},
    {"pooling": "mean", "ssl_coef": 1.0},
)


def one(variant: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train, and judge the classifier on the held-out responses."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = write_recipe(folder, variant, options)
        outcome = train(recipe, recipe_folder=folder, reporter=Silent())
        checkpoint = max((folder / "run" / "checkpoints").glob("checkpoint-*"))
        levels, told, prompts = classified(recipe, checkpoint)
    right = (levels == told).astype(float)
    counts = np.bincount(levels, minlength=LEVELS)
    return {
        **variant,
        "steps": outcome.step,
        "versions": len(levels),
        "commonest": float(counts.max() / counts.sum()),
        "accuracy": mean_with_interval(right, prompts),
        "by_level": [
            mean_with_interval(right[levels == level], [prompts[i] for i in np.flatnonzero(levels == level)])
            for level in range(LEVELS)
        ],
    }


def classified(recipe: Recipe, checkpoint: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(D,) levels of all held-out versions, (D,) what the classifier takes them for, and the prompt of each."""
    rows = prepare(recipe, Silent()).tokens.eval["holdout"]
    rows = rows.add_column("row_index", list(range(len(rows))))
    model, layout = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), Layout("pieces")
    layout.prepare(model)
    head = saved_head(checkpoint)
    collate = DegreeCollator(layout, 0, levels_per_step=None, seed=0)
    levels, told, prompts = [], [], []
    for start in range(0, len(rows), BATCH):
        batch = collate([rows[i] for i in range(start, min(start + BATCH, len(rows)))])
        with torch.no_grad():
            states = score_responses(model, batch, layout, pooling=recipe.method.pooling).states
        logits = states[batch["degree_passages"]] @ head["weight"].T + head["bias"]
        levels.append(batch["degree_levels"])
        told.append(logits.argmax(1))
        prompts += [str(rows[start + i]["prompt_ids"]) for i in batch["degree_rows"].tolist()]
    return torch.cat(levels).numpy(), torch.cat(told).numpy(), prompts


def write_recipe(folder: Path, variant: dict[str, Any], options: argparse.Namespace) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(**variant, **vars(options), out=folder / "run"))
    return load_recipe(path)


def report(rows: list[dict[str, Any]], options: argparse.Namespace, versions: dict[str, str]) -> str:
    def percent(figure: tuple[float, float, float]) -> str:
        return f"{figure[0]:.1%} [{figure[1]:.1%}, {figure[2]:.1%}]"

    lines = [
        [
            f"{row['pooling']}, ssl_coef {row['ssl_coef']:g}",
            percent(row["accuracy"]),
            *(percent(each) for each in row["by_level"]),
        ]
        for row in rows
    ]
    return "\n".join(
        [
            "# Degrees of human responses, told by a classifier on stories260K",
            "",
            f"HH-RLHF, {rows[0]['steps']} steps of 8 pairs ({options.epochs} epochs), learning rate "
            f"{options.learning_rate:g}. {rows[0]['versions']:,} held-out versions of responses, of which the "
            f"commonest level is {rows[0]['commonest']:.1%}: what always naming it scores. Brackets: 95 % intervals, "
            "bootstrap over prompts. Made by `python -m benchmarks.self_supervised_hh`.",
            "",
            *table(["pooling", "held-out accuracy", *(f"level {each}" for each in range(LEVELS))], lines),
            f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
            "",
        ]
    )


def main() -> None:
    """Run all, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(SHARED / "data" / "hh_helpful_harmless.jsonl.gz"))
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    print_only = options.print_only
    del options.print_only
    rows = []
    for variant in VARIANTS:
        rows.append(one(variant, options))
        print(json.dumps(rows[-1]), flush=True)
    versions = environment.versions()
    text = report(rows, options, versions)
    print(text)
    if print_only:
        return
    (HERE / "results" / "self-supervised-hh.md").write_text(text)
    record = {
        "versions": versions,
        "rows": rows,
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
    }
    (HERE / "results" / "self-supervised-hh.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
