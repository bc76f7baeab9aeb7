"""Policies trained in the sandbox by a recipe with other settings, and judged by the true reward."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs import environment, metrics
from prefopt_cli.sandbox.bench import Bench
from prefopt_cli.sandbox.plan import ScoreSettings, plan_score
from prefopt_cli.sandbox.world import open_world
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RESULTS = Path(__file__).resolve().parent / "results"

BASE = "sandbox:base"

UNWATCHED = ("dataset.eval={}", "training.eval_strategy=no")

Row = dict[str, Any]


def train_policy(
    recipe: str,
    overrides: Sequence[str],
    seed: int,
    run: Path,
    *,
    watched: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train by a shipped recipe with another seed, of training and of the order of the pairs; returns the run.

    It is evaluated on the held-out pairs, after every epoch, only if `watched`. With `overwrite`, a run that is in
    the way is deleted.
    """
    path = RECIPES / f"{recipe}.yaml"
    settings = [*overrides, f"training.seed={seed}", f"dataset.seed={seed}", f"output_dir={run}"]
    settings += [] if watched else UNWATCHED
    train(load_recipe(path, settings), recipe_folder=path.parent, reporter=Silent(), overwrite=overwrite)
    return run


def judge(run: Path, settings: ScoreSettings, figures: Sequence[str]) -> Row:
    """Gold reward, win rate and the named figures of a run on held-out prompts: [value, low, high] each."""
    bench = _bench(settings)
    opponent = bench.look_at(BASE)
    base, judged = opponent.score(), bench.look_at(str(run)).score(opponent)
    return {
        "win_rate": judged.win_rates["helpful"],
        "gain": judged.changes["reward/helpful"],
        **{name: judged.figures[name] for name in figures},
        "base": {name: base.figures[name].value for name in figures},
        "tokens": last_tokens(run),
    }


@lru_cache(maxsize=1)
def _bench(settings: ScoreSettings) -> Bench:
    """The base policy is looked at once in each process."""
    plan = plan_score([BASE], dimension="helpful", settings=settings)
    return Bench(open_world(plan.seed), plan)


def last_tokens(run: Path) -> int:
    """Tokens that went through the policy."""
    return int(
        next(
            record["num_tokens"]
            for record in reversed(metrics.read(run / "metrics.jsonl"))
            if "loss" in record
        )
    )


def last_evaluation(run: Path, eval_set: str) -> dict[str, float]:
    """The figures of the last evaluation on a set, without their prefix."""
    prefix = f"eval_{eval_set}_"
    record = next(each for each in reversed(metrics.read(run / "metrics.jsonl")) if f"{prefix}loss" in each)
    return {name.removeprefix(prefix): each for name, each in record.items() if name.startswith(prefix)}


def run_all(jobs: Sequence[Row], work: Callable[[Row], Row], rows: Path, processes: int) -> Iterator[Row]:
    """Do every job that `rows`, a file of JSON lines, does not hold yet; yields all rows in the jobs' order.

    Args:
        jobs: what tells one row from another; the rows begin with it.
        work: a function of a module, job -> row.
        rows: kept after each job, so that an interrupted benchmark goes on where it was.
        processes: how many jobs at a time.
    """
    done = {key(row["job"]): row for row in metrics.read(rows)}
    left = [job for job in jobs if key(job) not in done]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for job, row in zip(left, pool.map(work, left), strict=True):
            done[key(job)] = {"job": job, **row}
            metrics.append(rows, done[key(job)])
            print(json.dumps(done[key(job)]), flush=True)
    yield from (done[key(job)] for job in jobs)


def benchmark(
    name: str,
    doc: str | None,
    jobs: Callable[[int], Sequence[Row]],
    work: Callable[[Row], Row],
    report: Callable[[list[Row], dict[str, str]], str],
) -> list[Row] | None:
    """A command line: do all jobs, print the report, write it and the rows to `results/<name>.{md,json}`.

    Args:
        name: of the files.
        doc: the help text.
        jobs: number of seeds -> jobs.
        work: as for `run_all`.
        report: rows, versions -> Markdown.

    Returns:
        The rows; None where no files are to be written.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="policies at a time")
    parser.add_argument(
        "--rows", type=Path, help="file of finished rows, to go on with an interrupted benchmark"
    )
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.rows or Path(folder) / "rows.jsonl"
        rows = list(run_all(jobs(options.seeds), work, kept, options.processes))
    versions = environment.versions()
    text = report(rows, versions)
    print(text)
    if options.print_only:
        return None
    (RESULTS / f"{name}.md").write_text(text)
    record = json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(record)
    return rows


def key(job: Row) -> str:
    """A job as a word."""
    return json.dumps(job, sort_keys=True)
