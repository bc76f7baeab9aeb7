"""What a comparison means, in plain words."""

from collections.abc import Iterator

from prefopt_cli.evaluation.compare import Comparison
from prefopt_cli.evaluation.figures import overlap_of
from prefopt_cli.evaluation.findings import (
    TOO_FEW,
    Finding,
    dropped_rows,
    few_prompts,
    in_order,
    percent,
    points,
    train_overlap,
)
from prefopt_cli.evaluation.paired import PairedSet
from prefopt_cli.evaluation.statistics.bootstrap import Estimate

SIGNIFICANT = 0.05
"""Holm-adjusted p-values below it are worth a finding."""


def comparison_findings(comparison: Comparison) -> list[Finding]:
    """What is worth saying, policy by policy, what matters most first."""
    found = [*_of_all(comparison)]
    for name, each in comparison.sets.items():
        found += _of_set(comparison, name, each)
    return in_order(found)


def _of_all(comparison: Comparison) -> Iterator[Finding]:
    """Whether the policies are measured by the same thing; told once, with the first set."""
    name = next(iter(comparison.sets))
    targets = [each.target for each in comparison.policies]
    references = {each.reference for each in targets if each.reference}
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
    rewards = {each.reward for each in targets}
    without = [each.label for each in comparison.policies if each.target.reward is None]
    if 0 < len(without) < len(targets):
        yield Finding(
            "without_reward",
            name,
            "note",
            f"Without an implicit reward, as there is no reference: {', '.join(without)}. So all are compared by "
            "log-probability. --reference RUN_OR_MODEL gives all of them a reward.",
            float(len(without)),
            0.0,
        )
    elif len(rewards) > 1:
        said = "; ".join(
            sorted({f"{each.formula}, {each.scale_name} = {each.scale:g}" for each in rewards if each})
        )
        yield Finding(
            "different_rewards",
            name,
            "note",
            f"The policies' rewards are not of one scale ({said}), so margins are compared by log-probability, in "
            "nats.",
            float(len(rewards)),
            1.0,
        )


def _of_set(comparison: Comparison, name: str, paired: PairedSet) -> Iterator[Finding]:
    first = comparison.baseline.label
    for policy in comparison.policies:
        overlap = overlap_of(paired.scored[policy.label], policy.trained.keys)
        pairs = len(paired.first.chosen)
        yield from train_overlap(name, overlap, paired.prompts, pairs, f"{policy.label}: ")
    yield from few_prompts(name, paired.prompts)
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
    if paired.prompts < TOO_FEW:
        return
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
