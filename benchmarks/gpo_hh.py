"""The six losses of the GPO family on human preferences, before and after.

    python -m benchmarks.gpo_hh            # reads ../shared, writes benchmarks/results/gpo-hh.{md,json}

HH-RLHF (helpful and harmless), split by prompt into train and held-out; one epoch of full fine-tuning of the
260-thousand-parameter stories260K per loss, the same seed and order of pairs for all. Held-out accuracy is the
share of pairs whose chosen response the policy finds more likely (sum of log-probabilities), and, after
training, the share whose implicit reward beta * log(pi / pi_ref) is larger for the chosen one. Intervals: 95 %,
bootstrap over prompts. A model this small knows nothing of the subject; the table shows the machinery, not what
the losses can do.
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
from transformers import AutoModelForCausalLM

from prefopt_cli import data
from prefopt_cli.evaluation.statistics import mean_with_interval
from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS
from prefopt_cli.models.loading import load_tokenizer
from prefopt_cli.models.policy import find_policy
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import environment
from prefopt_cli.runs.metrics import read
from prefopt_cli.scoring.cache import Policy, ScoreCache
from prefopt_cli.scoring.frozen import score_frozen
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.batches import examples_of
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"

RECIPE = """\
model: {{name_or_path: {model}}}
dataset:
  train: {data}
  holdout: 0.2
  max_length: 512
method: {{name: gpo, loss: {loss}, beta: {beta}}}
training:
  per_device_train_batch_size: 8
  num_train_epochs: 1
  learning_rate: {learning_rate}
  warmup_steps: 20
  logging_steps: 50
  eval_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
  use_cpu: true
  seed: 0
output_dir: {out}
"""


def held_out(recipe: Recipe) -> tuple[data.TokenizedData, list[Example], list[str]]:
    """The tokenised data, the held-out pairs, and the prompt of each."""
    tokenizer = load_tokenizer(find_policy(recipe.model), recipe.model)
    text = data.load(recipe.dataset)
    tokens = data.tokenize(text, tokenizer, recipe.dataset)
    rows = tokens.eval["holdout"]
    prompts = {row.row_id: str(row.prompt) for row in text.eval["holdout"]}
    return tokens, examples_of(rows), [prompts[name] for name in rows["row_id"]]


def delta(folder: Path, pairs: list[Example]) -> np.ndarray:
    """log p(chosen) - log p(rejected) of every held-out pair, in nats."""
    model, layout = AutoModelForCausalLM.from_pretrained(folder), Layout()
    layout.prepare(model)
    with tempfile.TemporaryDirectory() as scratch, ScoreCache(Path(scratch, "scores")) as cache:
        scores = score_frozen(
            model, pairs, policy=Policy(str(folder), str(folder)), cache=cache, layout=layout
        )
    chosen, rejected = np.array(scores.logps).T
    return chosen - rejected


def one_loss(
    loss: str, options: argparse.Namespace, before: np.ndarray, pairs: list[Example], prompts: list[str]
) -> dict:
    """Train with one loss and judge it on the held-out pairs."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(
            write_recipe(Path(folder), loss, options), recipe_folder=Path(folder), reporter=Silent()
        )
        after = delta(outcome.run.model, pairs)
        logged = [record for record in read(outcome.run.metrics) if "loss" in record]
    return {
        "loss": loss,
        "steps": outcome.step,
        "train_loss_first": logged[0]["loss"],
        "train_loss_last": logged[-1]["loss"],
        "train_margin_last": logged[-1]["rewards/margins"],
        "accuracy_after": mean_with_interval(after > 0, prompts),
        "accuracy_change": mean_with_interval((after > 0).astype(float) - (before > 0), prompts),
        "reward_accuracy_after": mean_with_interval(after > before, prompts),
        "margin_after": mean_with_interval(options.beta * (after - before), prompts),
    }


def write_recipe(folder: Path, loss: str, options: argparse.Namespace) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(
        RECIPE.format(
            model=options.model,
            data=options.data,
            loss=loss,
            beta=options.beta,
            learning_rate=options.learning_rate,
            out=folder / "run",
        )
    )
    return load_recipe(path)


def table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    def percent(figure: tuple[float, float, float]) -> str:
        return f"{figure[0]:.1%} [{figure[1]:.1%}, {figure[2]:.1%}]"

    before = percent(facts["accuracy_before"])
    lines = [
        "# GPO losses on HH-RLHF, stories260K",
        "",
        f"{facts['train_pairs']} training pairs, {facts['heldout_pairs']} held-out pairs of "
        f"{facts['heldout_prompts']} prompts, {rows[0]['steps']} steps of 8 pairs, beta {facts['beta']}, learning rate "
        f"{facts['learning_rate']}. Brackets: 95 % intervals, bootstrap over prompts. Made by "
        "`python -m benchmarks.gpo_hh`.",
        "",
        "| loss | accuracy before | accuracy after | change | implicit-reward accuracy after | margin after |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        margin = "{:.3f} [{:.3f}, {:.3f}]".format(*row["margin_after"])
        lines.append(
            f"| {row['loss']} | {before} | {percent(row['accuracy_after'])} | {percent(row['accuracy_change'])} "
            f"| {percent(row['reward_accuracy_after'])} | {margin} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(SHARED / "data" / "hh_helpful_harmless.jsonl.gz"))
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--losses", nargs="*", default=list(CONVEX_FUNCTIONS))
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens, pairs, prompts = held_out(write_recipe(Path(folder), "logistic", options))
    before = delta(Path(options.model), pairs)
    facts = {
        "train_pairs": len(tokens.train),
        "heldout_pairs": len(prompts),
        "heldout_prompts": len(set(prompts)),
        "beta": options.beta,
        "learning_rate": options.learning_rate,
        "accuracy_before": mean_with_interval(before > 0, prompts),
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    rows = []
    for loss in options.losses:
        rows.append(one_loss(loss, options, before, pairs, prompts))
        print(json.dumps(rows[-1]), flush=True)
    text = table(facts, rows)
    print(text)
    if not options.print_only:
        (HERE / "results" / "gpo-hh.md").write_text(text)
        (HERE / "results" / "gpo-hh.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
