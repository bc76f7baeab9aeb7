"""The GPO family where the true reward is known: a beta sweep of the logistic loss, and all six losses.

    python -m benchmarks.sandbox_gpo       # writes benchmarks/results/sandbox-gpo.{md,json} and docs/*.svg

Every policy is trained by recipes/gpo-sandbox.yaml with another loss, beta and seed (of training and of the order
of the pairs) and then judged by the gold reward on held-out prompts. Betas of the other losses are those at which,
to second order, they regularise as strongly as logistic at 0.5: beta * |f''(0) / f'(0)| is the same; hinge has no
second order there and takes logistic's. The setting is that of the GPO paper's study (Tang et al. 2024, section 5):
a policy is pushed along its reward, and what it pays in KL is looked at.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs import environment
from prefopt_cli.sandbox.bench import ScoreSettings
from prefopt_cli.sandbox.score import score
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPE = ROOT / "recipes" / "gpo-sandbox.yaml"
SETTINGS = ScoreSettings(prompts=200, per_prompt=4, exact_prompts=12)

SWEEP = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
OTHERS = {
    "hinge": 0.5,
    "squared": 0.25,
    "exponential": 0.25,
    "truncated_quadratic": 0.25,
    "savage": 0.5,
}
FIGURES = ("kl", "entropy", "distinct", "well_formed", "reward/helpful", "total_variation")


def one(loss: str, beta: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train and judge one policy."""
    run = folder / f"{loss}-{beta:g}-{seed}"
    overrides = [
        f"method.loss={loss}",
        f"method.beta={beta}",
        f"training.seed={seed}",
        f"dataset.seed={seed}",
        "dataset.eval={}",
        "training.eval_strategy=no",
        "training.save_strategy=no",
        f"output_dir={run}",
    ]
    train(load_recipe(RECIPE, overrides), recipe_folder=RECIPE.parent, reporter=Silent())
    report = score([str(run)], settings=SETTINGS)
    judged = report.policies[0]
    return {
        "loss": loss,
        "beta": beta,
        "seed": seed,
        "target": report.target,
        "win_rate": judged.win_rates["helpful"],
        "gain": judged.changes["reward/helpful"],
        **{name: judged.figures[name] for name in FIGURES if name in judged.figures},
        "base": {
            name: report.opponent.figures[name].value for name in FIGURES if name in report.opponent.figures
        },
    }


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The seeds of every loss and beta together."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["loss"], row["beta"]), []).append(row)
    return list(found.values())


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Over the seeds, of the estimates' values."""
    return statistics.fmean(row[name][0] for row in rows)


def table(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """Markdown."""

    def spread(own: list[dict[str, Any]], name: str, scale: float = 1.0, digits: int = 2) -> str:
        if name not in own[0]:
            return "none"
        values = [scale * row[name][0] for row in own]
        return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    seeds = len(groups(rows)[0])
    lines = [
        "# GPO losses in the sandbox",
        "",
        f"recipes/gpo-sandbox.yaml with {seeds} seeds each, judged on {SETTINGS.prompts} held-out prompts with "
        f"{SETTINGS.per_prompt} samples each: means over the seeds, in brackets the least and the most. Rewards and "
        "win rates are by the gold reward `helpful`, against the base policy. Total variation to the closed form is "
        f"exact, on {SETTINGS.exact_prompts} prompts. Made by `python -m benchmarks.sandbox_gpo`.",
        "",
        "| loss | beta | win rate, % | gold reward gained | KL, nats | entropy, nats | well-formed, % "
        "| total variation, before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own in groups(rows):
        before = [row["base"]["total_variation"] for row in own if "total_variation" in row["base"]]
        cells = [
            own[0]["loss"],
            f"{own[0]['beta']:g}",
            spread(own, "win_rate", 100, 1),
            spread(own, "gain"),
            spread(own, "kl"),
            spread(own, "entropy"),
            spread(own, "well_formed", 100, 1),
            f"{statistics.fmean(before):.2f}" if before else "none",
            spread(own, "total_variation"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    significant = sum(row["gain"][1] > 0 for row in rows)
    lines += [
        "",
        f"The 95 % interval of the reward gained excludes zero in {significant} of {len(rows)} runs. "
        f"The base policy: gold reward {rows[0]['base']['reward/helpful']:.2f}, "
        f"entropy {rows[0]['base']['entropy']:.2f} nats, {rows[0]['base']['well_formed']:.1%} well-formed.",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The sweep as a curve, the other losses as points: what a win costs in KL."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "prefopt"  # the same figures, the same file
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    points = {(own[0]["loss"], own[0]["beta"]): own for own in groups(rows)}
    sweep = [own for (loss, _), own in points.items() if loss == "logistic"]
    axes.plot(
        [mean(own, "kl") for own in sweep],
        [100 * mean(own, "win_rate") for own in sweep],
        "-o",
        label="logistic",
    )
    for (loss, beta), own in points.items():
        place = (mean(own, "kl"), 100 * mean(own, "win_rate"))
        if loss != "logistic":
            axes.plot(*place, "s", label=f"{loss}, β = {beta:g}")
        else:
            axes.annotate(
                f"β = {beta:g}", place, textcoords="offset points", xytext=(-8, 6), ha="right", fontsize=8
            )
    axes.set_xscale("log")
    axes.set_xlabel("KL to the base policy (nats)")
    axes.set_ylabel("win rate against the base policy (%)")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Run all, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--print-only", action="store_true", help="write no files")
    options = parser.parse_args()
    wanted = [("logistic", beta) for beta in SWEEP] + list(OTHERS.items())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for loss, beta in wanted:
                rows.append(one(loss, beta, seed, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    versions = environment.versions()
    text = table(rows, versions)
    print(text)
    if not options.print_only:
        (HERE / "results" / "sandbox-gpo.md").write_text(text)
        (HERE / "results" / "sandbox-gpo.json").write_text(
            json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
        )
        draw(rows, ROOT / "docs" / "sandbox-kl-win-rate.svg")


if __name__ == "__main__":
    main()
