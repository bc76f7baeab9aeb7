"""The tables of `benchmarks.sandbox_self_supervised`."""

import statistics
from collections.abc import Callable

from benchmarks.sandbox_runs import Row
from benchmarks.tables import over_seeds, shown, table, value
from prefopt_cli.sandbox.plan import ScoreSettings

Figure = Callable[[Row], float]

COLUMNS: dict[str, tuple[Figure, int, float]] = {
    "gold reward": (lambda row: value(row, "reward/helpful"), 2, 1),
    "win rate, %": (lambda row: value(row, "win_rate"), 1, 100),
    "held-out accuracy, %": (lambda row: float(row["heldout"]["rewards/accuracies"]), 1, 100),
    "KL to base, nats": (lambda row: value(row, "kl"), 2, 1),
    "well-formed, %": (lambda row: value(row, "well_formed"), 1, 100),
}
"""Title -> figure, digits, scale."""


def name_of(job: Row) -> str:
    """A policy in words, whatever its seed."""
    if "ssl_coef" not in job:
        return f"{job['align']} alone"
    pooling = ", last state" if job["pooling"] == "last" else ""
    return f"{job['align']}, ssl_coef {job['ssl_coef']:g}, {job['levels']} levels{pooling}"


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """The seeds of every policy together."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name_of(row["job"]), []).append(row)
    return found


def report(rows: list[Row], versions: dict[str, str], settings: ScoreSettings) -> str:
    """Markdown."""
    found = groups(rows)
    lines = [
        "# The preference-degree loss in the sandbox",
        "",
        _setting(rows, settings),
        "",
        "## Every policy",
        "",
        *table(["", *COLUMNS, "tokens"], [_policy(name, own) for name, own in found.items()]),
        "## With the degree loss minus without it, seed by seed",
        "",
        "Half a 95 % interval (Student's t, paired by seed) follows each mean; bold: it excludes 0.",
        "",
        *_differences(found),
        "## What the classifier tells of held-out responses",
        "",
        "Over all levels of the held-out responses, and at each level. Always naming the commonest level would score "
        "the share in the second column.",
        "",
        *_levels(found),
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
    ]
    return "\n".join(lines)


def _setting(rows: list[Row], settings: ScoreSettings) -> str:
    seeds, base = len({row["job"]["seed"] for row in rows}), rows[0]["base"]
    return (
        f"{seeds} seeds each, one epoch of 64 pairs a step, judged on {settings.prompts} held-out prompts with "
        f"{settings.per_prompt} samples each and on 1,000 held-out pairs; mean ± half a 95 % interval over the seeds "
        "(Student's t). Win rates are by the gold reward `helpful` against the base policy (gold reward "
        f"{base['reward/helpful']:.2f}). Held-out accuracy is by the implicit reward; of soft by its own, alpha times "
        "the log-probability. Levels are read from the mean of a response's states but where the last one is named. "
        "Made by `python -m benchmarks.sandbox_self_supervised`."
    )


def _policy(name: str, own: list[Row]) -> list[str]:
    figures = [shown([of(row) for row in own], digits, scale) for of, digits, scale in COLUMNS.values()]
    return [name, *figures, f"{statistics.fmean(row['tokens'] for row in own):,.0f}"]


def _differences(found: dict[str, list[Row]]) -> list[str]:
    lines = []
    for name, own in found.items():
        job = own[0]["job"]
        if "ssl_coef" not in job:
            continue
        alone = {row["job"]["seed"]: row for row in found[f"{job['align']} alone"]}
        lines.append(
            [
                name,
                *(
                    _bold([of(row) - of(alone[row["job"]["seed"]]) for row in own], digits, scale)
                    for of, digits, scale in COLUMNS.values()
                ),
            ]
        )
    return table(["", *COLUMNS], lines)


def _bold(values: list[float], digits: int, scale: float) -> str:
    text = shown(values, digits, scale)
    text = text if text.startswith("-") else f"+{text}"
    mean, width = over_seeds(values)  # not a number with one seed, and then nothing is larger
    return f"**{text}**" if abs(mean) > width else text


def _levels(found: dict[str, list[Row]]) -> list[str]:
    most = max(row["job"].get("levels", 0) for own in found.values() for row in own)
    names = ["ssl/loss", "ssl/accuracy", *(f"ssl/accuracy_level_{level}" for level in range(most))]
    lines = []
    for name, own in found.items():
        if "ssl_coef" in own[0]["job"]:
            cells = [
                shown([row["heldout"][each] for row in own], 2) if each in own[0]["heldout"] else ""
                for each in names
            ]
            counts = own[0]["degrees"]["levels"].values()
            lines.append([name, f"{max(counts) / sum(counts):.2f}", *cells])
    titles = ["commonest", "cross-entropy, nats", "accuracy", *(f"level {each}" for each in range(most))]
    return table(["", *titles], lines)
