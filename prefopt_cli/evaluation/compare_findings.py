"""What a comparison means, in plain words."""

from collections.abc import Iterator

from prefopt_cli.evaluation.compare import Comparison
from prefopt_cli.evaluation.findings import Finding, dropped_rows, in_order, percent, points
from prefopt_cli.evaluation.paired import PairedSet
from prefopt_cli.evaluation.statistics.bootstrap import Estimate

SIGNIFICANT = 0.05
"""Holm-adjusted p-values below it are worth a finding."""


def comparison_findings(comparison: Comparison) -> list[Finding]:
    """What is worth saying, policy by policy, what matters most first."""
    found = [finding for name, each in comparison.sets.items() for finding in _of_set(comparison, name, each)]
    return in_order(found)


def _of_set(comparison: Comparison, name: str, paired: PairedSet) -> Iterator[Finding]:
    first = comparison.baseline.label
    references = {each.target.reference for each in comparison.policies if each.target.reference}
    if len(references) > 1:
        yield Finding(
            "different_references",
            name,
            "warning",
            f"The policies are measured from {len(references)} different references: their rewards and KLs are of "
            "different things. --reference RUN_OR_MODEL measures all from one.",
            float(len(references)),
            1.0,
        )
    without = [each.label for each in comparison.policies if each.target.reward is None]
    if 0 < len(without) < len(comparison.policies):
        yield Finding(
            "without_reward",
            name,
            "note",
            f"{', '.join(without)} has no implicit reward, as it has no reference, so all are compared by "
            "log-probability. --reference RUN_OR_MODEL gives all of them one.",
            float(len(without)),
            0.0,
        )
    yield from dropped_rows(name, paired.first)
    if paired.left_out:
        yield Finding(
            "left_out",
            name,
            "note",
            f"{paired.left_out:,} rows are left out, because not every policy could take them in full.",
            float(paired.left_out),
            0.0,
        )
    undecided = []
    for label, measures in paired.differences.items():
        difference = measures["accuracy/main"]
        if difference.p_holm >= SIGNIFICANT:
            undecided.append(label)
            continue
        better = difference.estimate.value > 0
        yield Finding(
            "better_than_baseline" if better else "worse_than_baseline",
            name,
            "good" if better else "warning",
            f"{label} is {'more' if better else 'less'} accurate than {first}: "
            f"{percent(_accuracy(paired, label))} against {percent(_accuracy(paired, first))}, difference "
            f"{points(difference.estimate)} points, p = {difference.p_holm:.2g} (Holm).",
            difference.estimate.value,
            0.0,
        )
    if undecided:
        yield Finding(
            "like_baseline",
            name,
            "note",
            f"No difference to {first} in accuracy is certain for {', '.join(undecided)} (Holm-adjusted p of "
            f"{SIGNIFICANT} or more).",
            float(len(undecided)),
            SIGNIFICANT,
        )


def _accuracy(paired: PairedSet, label: str) -> Estimate:
    return paired.figures[label][f"accuracy/{paired.main}"]
