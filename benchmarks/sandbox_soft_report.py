"""The tables and pictures of `benchmarks.sandbox_soft`."""

import statistics
from pathlib import Path

import numpy as np

from benchmarks.sandbox_runs import Row
from benchmarks.tables import shown, table, value
from prefopt_cli.sandbox.plan import ScoreSettings


def at_same(rows: list[Row], own: Row, x: str, y: str) -> float | None:
    """DPO's `y` where its `x` is that of a soft run of the same seed; None outside of what its betas reach.

    Beyond the beta of its best `x`, DPO loses both; only the betas from there on are compared with.
    """
    dpo = [row for row in rows if row["job"]["method"] == "gpo" and row["job"]["seed"] == own["job"]["seed"]]
    dpo.sort(key=lambda row: -row["job"]["beta"])
    best = max(range(len(dpo)), key=lambda i: value(dpo[i], x))
    branch = dpo[: best + 1]
    xs, ys = [value(row, x) for row in branch], [value(row, y) for row in branch]
    wanted = value(own, x)
    if not min(xs) <= wanted <= max(xs):
        return None
    order = np.argsort(xs)
    return float(np.interp(wanted, np.array(xs)[order], np.array(ys)[order]))


def name_of(job: Row) -> str:
    if job["method"] == "gpo":
        return f"DPO, beta {job['beta']:g}"
    kl = f", kl_coef {job['kl_coef']:g}" if job["kl_coef"] else ""
    kind = f", {job['kind'].replace('_', ' ')}" if "kind" in job else ""
    return f"soft, alpha {job['alpha']:g}{kl}{kind}"


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """The seeds of every policy together."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name_of(row["job"]), []).append(row)
    return found


def report(rows: list[Row], versions: dict[str, str], settings: ScoreSettings, enumerated: int) -> str:
    """Markdown."""
    lines = [
        "# Soft preference optimization in the sandbox",
        "",
        _setting(rows, settings, enumerated),
        "",
        "## 1. Without KL: towards softmax(r / alpha)",
        "",
        "Mean total variation to the optimum during training, and the entropy at its end.",
        "",
        *_approach(groups(rows)),
        "## 2. and 3. Every policy",
        "",
        *_policies(groups(rows)),
        "## Against DPO at the same win rate and at the same reward",
        "",
        "Soft minus DPO of the same seed, linearly between DPO's betas; none outside of what these reach.",
        "",
        *_comparison(rows),
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
    ]
    return "\n".join(lines)


def _setting(rows: list[Row], settings: ScoreSettings, enumerated: int) -> str:
    seeds, base = len({row["job"]["seed"] for row in rows}), rows[0]["base"]
    return (
        f"{seeds} seeds each, judged on {settings.prompts} held-out prompts with {settings.per_prompt} samples each; "
        "mean ± half a 95 % interval over the seeds (Student's t). Win rates are by the gold reward `helpful` against "
        f"the base policy (gold reward {base['reward/helpful']:.2f}, entropy {base['entropy']:.2f} nats, "
        f"{base['distinct']:.1%} of a prompt's samples distinct). Total variation is exact, on "
        f"{enumerated} prompts. Runs on pairs are one epoch of 64 pairs a step, those on lists (of four "
        "replies) two epochs of 64 lists a step. Made by `python -m benchmarks.sandbox_soft`."
    )


def _approach(found: dict[str, list[Row]]) -> list[str]:
    """The distance to the optimum during training, of the runs without KL."""
    free = {name: own for name, own in found.items() if own[0].get("distances")}
    looks = range(len(next(iter(free.values()))[0]["distances"]))
    return table(
        ["", *(f"{look / looks[-1]:.0%} of the steps" for look in looks), "entropy, nats"],
        [
            [
                name,
                *(shown([row["distances"][i][1] for row in own], 3) for i in looks),
                shown([value(row, "entropy") for row in own]),
            ]
            for name, own in free.items()
        ],
    )


COLUMNS = {
    "win rate, %": ("win_rate", 1, 100),
    "gold reward": ("reward/helpful", 2, 1),
    "entropy, nats": ("entropy", 2, 1),
    "distinct, %": ("distinct", 1, 100),
    "KL to base, nats": ("kl", 2, 1),
    "well-formed, %": ("well_formed", 1, 100),
}
"""Title -> figure, digits, scale."""


def _policies(found: dict[str, list[Row]]) -> list[str]:
    def line(name: str, own: list[Row]) -> list[str]:
        figures = [
            shown([value(row, figure) for row in own], digits, scale)
            for figure, digits, scale in COLUMNS.values()
        ]
        return [name, *figures, f"{statistics.fmean(row['tokens'] for row in own):,.0f}"]

    return table(["", *COLUMNS, "tokens"], [line(name, own) for name, own in found.items()])


COMPARISONS = {
    "entropy at the same win rate, nats": ("win_rate", "entropy", 1),
    "distinct at the same win rate, points": ("win_rate", "distinct", 100),
    "KL to base at the same reward, nats": ("reward/helpful", "kl", 1),
}
"""Title -> what is the same, what differs, scale."""


def _comparison(rows: list[Row]) -> list[str]:
    def difference(own: list[Row], x: str, y: str, scale: float) -> str:
        pairs = [(value(row, y), at_same(rows, row, x, y)) for row in own]
        found = [ours - theirs for ours, theirs in pairs if theirs is not None]
        return shown(found, 2, scale) if len(found) == len(own) else "none"

    soft = {name: own for name, own in groups(rows).items() if own[0]["job"]["method"] == "soft"}
    lines = [
        [name, *(difference(own, *wanted) for wanted in COMPARISONS.values())] for name, own in soft.items()
    ]
    return table(["", *COMPARISONS], lines)


def draw(rows: list[Row], path: Path, x: str, y: str, labels: tuple[str, str]) -> None:
    """Means over the seeds: one curve for DPO's betas, one for alpha without KL, one for each alpha with KL."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "prefopt"  # the same figures, the same file
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for own in groups(rows).values():
        job = own[0]["job"]
        if "kind" in job:
            continue
        curve = "DPO, beta" if job["method"] == "gpo" else "soft, alpha, no KL"
        curve = f"soft, alpha {job['alpha']:g}, kl_coef" if job.get("kl_coef") else curve
        place = tuple(statistics.fmean(value(row, name) for row in own) for name in (x, y))
        curves.setdefault(curve, []).append(place)
        setting = job.get("beta") or job.get("kl_coef") or job["alpha"]
        axes.annotate(f"{setting:g}", place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    for label, places in curves.items():
        axes.plot(*zip(*places, strict=True), "-o", markersize=4, label=label)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
