"""Soft preference optimization where the true reward is known: its optimum, its diversity, its KL.

    python -m benchmarks.sandbox_soft       # writes benchmarks/results/sandbox-soft.{md,json} and docs/soft-*.svg

Three questions, each over several seeds (of training and of the order of the pairs), judged on held-out prompts:

1. Without KL: does the distance to softmax(r / alpha) fall during training, and is lower alpha lower entropy?
2. At the same win rate against the base policy, does soft keep more entropy than DPO (gpo, logistic)?
3. With the KL on the policy's own samples, what KL does the same reward cost, beside DPO, whose regularisation is
   over the data?

Soft runs are recipes/soft-sandbox.yaml, DPO runs recipes/gpo-sandbox.yaml: the same pairs, batches, steps and learning
rate. For questions 2 and 3 each soft run is compared with DPO of the same seed at its win rate (or reward), linearly
between the two neighbouring betas.
"""

import os
import statistics
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sandbox_runs import Row, benchmark, judge, train_policy
from benchmarks.sandbox_soft_report import draw, report
from prefopt_cli.sandbox.measure import exact_logps
from prefopt_cli.sandbox.plan import ScoreSettings
from prefopt_cli.sandbox.rewards import reward_table
from prefopt_cli.sandbox.targets import softmax_target, total_variation
from prefopt_cli.sandbox.world import open_world

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ScoreSettings(prompts=150, per_prompt=16, exact_prompts=0)
ENUMERATED = 12
"""Held-out prompts on which the distance to the optimum is computed over all replies."""
FIGURES = ("kl", "entropy", "distinct", "well_formed", "reward/helpful")

WITHOUT_KL = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
WITH_KL = ((0.5, 0.03), (0.5, 0.1), (0.5, 0.3), (0.5, 1.0), (0.25, 0.1), (0.25, 0.3), (0.25, 1.0))
LISTS = ("ranked", "best_of_n")
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)
DURING = 0.25
"""Share of the steps between two looks at the distance to the optimum."""


def jobs(seeds: int) -> list[Row]:
    """Every policy, seed by seed."""
    soft = [{"method": "soft", "alpha": alpha, "kl_coef": 0.0} for alpha in WITHOUT_KL]
    soft += [{"method": "soft", "alpha": 1.0, "kl_coef": 0.0, "kind": kind} for kind in LISTS]
    soft += [{"method": "soft", "alpha": alpha, "kl_coef": kl_coef} for alpha, kl_coef in WITH_KL]
    dpo = [{"method": "gpo", "beta": beta} for beta in BETAS]
    return [{**job, "seed": seed} for seed in range(seeds) for job in soft + dpo]


def work(job: Row) -> Row:
    """Train and judge one policy."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if job["method"] == "gpo":
            overrides = [f"method.beta={job['beta']}", "training.save_strategy=no"]
            row = judge(train_policy("gpo-sandbox", overrides, job["seed"], run), SETTINGS, FIGURES)
            return {**row, "distances": None}
        alpha = job["alpha"]
        overrides = [f"method.alpha={alpha}", f"method.kl_coef={job['kl_coef']}"]
        if "kind" in job:  # a list of four has the replies of two pairs
            lists = f"dataset.train={{source: 'sandbox:helpful', config: {job['kind']}}}"
            overrides += [lists, "training.num_train_epochs=2", "training.per_device_train_batch_size=64"]
        free = job["kl_coef"] == 0
        overrides += [f"training.save_steps={DURING}"] if free else ["training.save_strategy=no"]
        train_policy("soft-sandbox", overrides, job["seed"], run)
        row = judge(run, SETTINGS, FIGURES)
        return {**row, "distances": distances(run, alpha) if free else None}


def distances(run: Path, alpha: float) -> list[tuple[int, float]]:
    """(step, mean total variation to softmax(r / alpha)) before training and at every checkpoint."""
    folders = sorted(
        (run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    found = [(0, distance(None, alpha))]
    return found + [(int(path.name.split("-")[1]), distance(path, alpha)) for path in folders]


@lru_cache(maxsize=1)
def prompts() -> Any:
    """The enumerated prompts, of the world that the recipes name."""
    world = open_world(0)
    return world, [row.prompt for row in world.pool("test")[:ENUMERATED]]


def distance(folder: Path | None, alpha: float) -> float:
    """Of a saved policy (None: the base policy), on the enumerated prompts."""
    world, wanted = prompts()
    place = folder or world.base
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(world.base)
    target = softmax_target(alpha).distribution
    return statistics.fmean(
        total_variation(logps, target(logps, reward_table(prompt.problem, "helpful")))
        for logps, prompt in zip(exact_logps(model.eval(), tokenizer, wanted), wanted, strict=True)
    )


def main() -> None:
    """Run all, print the tables, write the results."""
    rows = benchmark(
        "sandbox-soft",
        __doc__,
        jobs,
        work,
        lambda rows, versions: report(rows, versions, SETTINGS, ENUMERATED),
    )
    if rows is None:
        return
    draw(
        rows,
        ROOT / "docs" / "soft-entropy-win-rate.svg",
        "win_rate",
        "entropy",
        ("win rate against the base policy", "entropy (nats)"),
    )
    draw(
        rows,
        ROOT / "docs" / "soft-kl-reward.svg",
        "reward/helpful",
        "kl",
        ("gold reward", "KL to the base policy (nats)"),
    )


if __name__ == "__main__":
    main()
