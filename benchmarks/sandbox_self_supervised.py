"""What the preference-degree loss changes where the true reward is known.

    python -m benchmarks.sandbox_self_supervised   # writes benchmarks/results/sandbox-self-supervised.{md,json}

Policies trained with the degree loss beside an alignment loss and without it, of the same seed (of training and of the
order of the pairs), at equal steps, are judged on held-out prompts by the gold reward and on held-out pairs by their
implicit reward; the classifier is judged on all levels of the held-out responses. Runs with the degree loss are
recipes/self-supervised-sandbox.yaml, those without are recipes/gpo-sandbox.yaml with the alignment loss alone.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.sandbox_runs import Row, benchmark, judge, last_evaluation, train_policy
from benchmarks.sandbox_self_supervised_report import report
from prefopt_cli.sandbox.plan import ScoreSettings

SETTINGS = ScoreSettings(prompts=150, per_prompt=16, exact_prompts=0)
FIGURES = ("kl", "well_formed", "reward/helpful")

ALIGNMENTS = {
    "logistic": "{name: gpo, loss: logistic, beta: 0.5}",
    "squared": "{name: gpo, loss: squared, beta: 0.5}",
    "soft": "{name: soft, alpha: 0.5, kl_coef: 0.1, regularizer: {max_new_tokens: 48}}",
}
COEFFICIENTS = (0.1, 0.3, 1.0, 3.0)
LEVELS = (2, 4, 8)
COMPARED = (0.1, 1.0)
"""Coefficients at which every alignment loss is compared with itself alone, and both poolings."""


def jobs(seeds: int) -> list[Row]:
    """Every policy, seed by seed; first what all else is compared with."""
    alone = [{"align": align} for align in ALIGNMENTS]
    beside = [
        {"align": align, "ssl_coef": coef, "levels": 4, "pooling": "mean"}
        for align in ALIGNMENTS
        for coef in COMPARED
    ]
    swept = [
        {"align": "logistic", "ssl_coef": coef, "levels": levels, "pooling": "mean"}
        for coef in COEFFICIENTS
        for levels in LEVELS
    ]
    last = [{"align": "logistic", "ssl_coef": coef, "levels": 4, "pooling": "last"} for coef in COMPARED]
    listed = alone + beside + [job for job in swept if job not in beside] + last
    return [{**job, "seed": seed} for seed in range(seeds) for job in listed]


def work(job: Row) -> Row:
    """Train and judge one policy."""
    align = ALIGNMENTS[job["align"]]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = ["training.save_strategy=no"]
        if "ssl_coef" in job:
            overrides += [f"method.align={align}", f"method.pooling={job['pooling']}"]
            overrides += [f"method.{name}={job[name]}" for name in ("ssl_coef", "levels")]
            train_policy("self-supervised-sandbox", overrides, job["seed"], run, watched=True)
        else:
            train_policy("gpo-sandbox", [*overrides, f"method={align}"], job["seed"], run, watched=True)
        heldout = last_evaluation(run, "heldout")
        kept = {name: each for name, each in heldout.items() if name.startswith(("ssl/", "rewards/acc"))}
        receipt = json.loads((run / "manifest.json").read_text())["receipt"]["sets"]["heldout"]
        return {**judge(run, SETTINGS, FIGURES), "heldout": kept, "degrees": receipt["degrees"]}


def main() -> None:
    """Run all, print the tables, write the results."""
    benchmark(
        "sandbox-self-supervised",
        __doc__,
        jobs,
        work,
        lambda rows, versions: report(rows, versions, SETTINGS),
    )


if __name__ == "__main__":
    main()
