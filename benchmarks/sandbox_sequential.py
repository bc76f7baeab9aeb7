"""Sequential preference optimization where the true rewards are known: what a stage costs the dimensions before it.

    python -m benchmarks.sandbox_sequential  # writes benchmarks/results/sandbox-sequential.{md,json} and a docs/*.svg

Dimensions of the sandbox in the order helpful, polite, concise; polite and concise pull against each other. Over
several seeds (of training and of the order of the pairs), judged by the gold rewards on held-out prompts after every
stage:

- naive: every stage by DPO after the one before (lambda 0);
- sequential: the same with one lambda for every earlier dimension;
- the last stage alone, from the naive second one, with lambda and without, over several betas: beta trades its gain
  for what is forgotten, so that both can be compared at the same gain;
- joint: the pairs of all three dimensions mixed, one run by DPO;
- reversed: concise, polite, helpful.

Stages are recipes/gpo-sandbox.yaml and recipes/sequential-sandbox.yaml: one epoch of 64 pairs a step each.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.sandbox_runs import Row, benchmark, judge, train_policy
from benchmarks.sandbox_sequential_report import draw, report
from prefopt_cli.evaluation.retention import retention
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.sandbox.plan import ScoreSettings
from prefopt_cli.training.reporting import Silent

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "sequential-trade-off.svg"
SETTINGS = ScoreSettings(prompts=150, per_prompt=16, exact_prompts=0)
ORDER = ("helpful", "polite", "concise")
FIGURES = (*(f"reward/{name}" for name in ORDER), "kl", "entropy")
BETA = 0.5
LAMBDAS = (0.25, 0.5, 1.0, 2.0)
LAST_LAMBDAS, LAST_BETAS = (0.0, 0.25, 1.0), (BETA, 1.0, 2.0, 4.0)
"""Of the last stage alone."""

RUNS = Path(tempfile.gettempdir()) / "prefopt-sandbox-sequential"
"""Policies that several jobs go on from; may be deleted."""

Stage = dict[str, Any]


def line(order: Sequence[str], value: float, **last: float) -> list[Stage]:
    """Stages of a chain with one lambda for all earlier dimensions; `last`: what differs in the last one."""
    stages: list[Stage] = [{"dimension": name, "lambda": value, "beta": BETA} for name in order]
    stages[0]["lambda"] = 0.0
    stages[-1].update(last)
    return stages


def jobs(seeds: int) -> list[Row]:
    """Every policy to be judged, as the stages that lead to it; early stages first, so that nothing waits for long."""
    lines = [line(order, value) for order in (ORDER, ORDER[::-1]) for value in (0.0, 0.5)]
    lines += [line(ORDER, value) for value in LAMBDAS]
    lines += [
        line(ORDER, 0.0, **{"lambda": value}, beta=beta) for value in LAST_LAMBDAS for beta in LAST_BETAS
    ]
    found: list[Row] = []
    for length in range(1, len(ORDER) + 1):
        for seed in range(seeds):
            for each in lines:
                job = {"kind": "stages", "stages": each[:length], "seed": seed}
                if job not in found:
                    found.append(job)
    found += [{"kind": "joint", "beta": BETA, "seed": seed} for seed in range(seeds)]
    chains = [
        each for each in lines if each == line([stage["dimension"] for stage in each], each[1]["lambda"])
    ]
    return found + [
        {"kind": "retention", "stages": each, "seed": seed}
        for number, each in enumerate(chains)
        if each not in chains[:number]
        for seed in range(seeds)
    ]


def work(job: Row) -> Row:
    """Train what is not there yet, and judge the last policy."""
    if job["kind"] == "retention":
        return held_out(trained(job["stages"], job["seed"]))
    run = joint(job) if job["kind"] == "joint" else trained(job["stages"], job["seed"])
    return judge(run, SETTINGS, FIGURES)


def held_out(run: Path) -> Row:
    """What `prefopt retention` tells of a chain's end: accuracy on each dimension, and its change since its stage."""
    sets = {name: {"source": f"sandbox:{name}", "split": "test"} for name in ORDER}
    table = retention(RunFolder(run), Silent(), overrides=[f"dataset.eval={json.dumps(sets)}"])
    last = table.stages[-1]
    return {
        "accuracy": {name: list(table.cells[last, name].accuracy) for name in ORDER},
        "change": {name: list(each.accuracy) for name, each in table.changes.items()},
    }


def joint(job: Row) -> Path:
    """DPO on the pairs of all dimensions together: as many steps as the three stages have."""
    run = RUNS / f"joint-{job['seed']}"
    mixed = ", ".join(f"'sandbox:{name}'" for name in ORDER)
    overrides = [f"dataset.train=[{mixed}]", f"method.beta={job['beta']}", "dimension=joint"]
    return once(run, "gpo-sandbox", overrides, job["seed"])


def trained(stages: list[Stage], seed: int) -> Path:
    """The run of the last stage, after those before it."""
    run = folder(stages, seed)
    *before, last = stages
    overrides = [
        f"dataset.train=sandbox:{last['dimension']}",
        f"dimension={last['dimension']}",
        f"method.beta={last['beta']}",
    ]
    if not before:
        return once(run, "gpo-sandbox", overrides, seed)
    previous = trained(before, seed)
    earlier = [folder(stages[: number + 1], seed) for number in range(len(before))]
    overrides += [
        f"model.name_or_path={previous}",
        f"method.previous=[{', '.join(map(str, earlier))}]",
        f"method.lambdas={last['lambda']}",
    ]
    return once(run, "sequential-sandbox", overrides, seed)


def folder(stages: list[Stage], seed: int) -> Path:
    """Where the run of the last of these stages lies."""
    name = "-".join(f"{stage['dimension']}_{stage['lambda']:g}_{stage['beta']:g}" for stage in stages)
    return RUNS / f"{name}-{seed}"


def once(run: Path, recipe: str, overrides: list[str], seed: int) -> Path:
    """Train unless the run is there; another process that is at it is waited for."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{run.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = RunFolder(run)
        if not (found.is_run() and found.read_manifest()["status"] == "finished"):
            options = [*overrides, "training.save_strategy=no"]
            train_policy(recipe, options, seed, run, overwrite=found.is_run())
    return run


def main() -> None:
    """Run all, print the tables, write the results."""
    rows = benchmark(
        "sandbox-sequential",
        __doc__,
        jobs,
        work,
        lambda rows, versions: report(rows, versions, SETTINGS, BETA),
    )
    if rows is not None:
        draw(rows, PICTURE, BETA)


if __name__ == "__main__":
    main()
