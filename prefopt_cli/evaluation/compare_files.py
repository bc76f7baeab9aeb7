"""A comparison as a summary, as files, and in plain words."""

import csv
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prefopt_cli.errors import PrefoptError
from prefopt_cli.evaluation.compare import Comparison, Policy
from prefopt_cli.evaluation.compare_findings import comparison_findings
from prefopt_cli.evaluation.evaluate import made_by
from prefopt_cli.evaluation.figures import overlap_of
from prefopt_cli.evaluation.kl_picture import Point, kl_picture, write_picture
from prefopt_cli.evaluation.pages.compare_page import compare_page
from prefopt_cli.evaluation.paired import SHOWN, Decode, PairedSet
from prefopt_cli.evaluation.statistics import LEVEL, Estimate
from prefopt_cli.models import loading
from prefopt_cli.runs import atomic, environment

SUMMARY, TABLE, CHANGES, REPORT = "summary.json", "compare.csv", "changes.jsonl", "report.html"
PICTURE = "kl.png"
KL_AXIS = "KL to the reference (nats)"


def summary_of(comparison: Comparison) -> dict[str, Any]:
    """Everything for JSON; of the pairs that changed sides only how many."""
    return {
        "baseline": comparison.baseline.target.name,
        "level": LEVEL,
        "kl": _kl(comparison),
        "policies": [_policy(comparison, each) for each in comparison.policies],
        "skipped": [{"name": each.name, "reason": each.reason} for each in comparison.skipped],
        "sets": {name: _set(each) for name, each in comparison.sets.items()},
        "findings": [each.to_dict() for each in comparison_findings(comparison)],
        "made": comparison.made,
        "versions": environment.versions(),
    }


def write(comparison: Comparison, folder: Path, plot: Path | None = None) -> None:
    """Write summary, table, changed pairs, page and picture, each atomically.

    Args:
        comparison: what was found out.
        folder: where the files go.
        plot: where the picture of KL against accuracy or gold reward goes; None: into the folder.

    Raises:
        PrefoptError: the folder cannot be written.
    """
    summary = summary_of(comparison)
    decode = _decoder(comparison.baseline)
    changed = {
        name: {policy.label: each.change_records(policy.label, decode) for policy in comparison.policies[1:]}
        for name, each in comparison.sets.items()
    }
    shown = {
        name: [record for records in by_policy.values() for record in records[:SHOWN]]
        for name, by_policy in changed.items()
    }
    others = ", ".join(each.label for each in comparison.policies[1:])
    page = compare_page(
        {**summary, "changed": shown},
        title=f"{others} against {comparison.baseline.label}",
        made=made_by(summary),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json_lines(
            folder / CHANGES,
            (record for by in changed.values() for records in by.values() for record in records),
        )
        atomic.write_text(folder / TABLE, _table(comparison))
        atomic.write_json(folder / SUMMARY, summary)
        atomic.write_text(folder / REPORT, page)
        drawn = _picture(comparison)
        if drawn:
            write_picture(drawn, plot or folder / PICTURE)
        else:  # one of an earlier comparison says nothing of this one
            (folder / PICTURE).unlink(missing_ok=True)
    except OSError as error:
        raise PrefoptError(f"The comparison cannot be written to {folder}: {error.strerror}.") from error


def _kl(comparison: Comparison) -> dict[str, int] | None:
    """How the KL was sampled: at most so many prompts as there are."""
    sampled = [each.divergence.prompts for each in comparison.policies if each.divergence]
    if comparison.kl is None or not sampled:
        return None
    return {"prompts": max(sampled), "max_new_tokens": comparison.kl.max_new_tokens}


def _policy(comparison: Comparison, policy: Policy) -> dict[str, Any]:
    target = policy.target
    return {
        "name": target.name,
        "label": policy.label,
        "run": str(target.run.path) if target.run else None,
        "method": target.recipe.method.model_dump() if target.run else None,
        "reference": target.reference.describe() if target.reference else None,
        "reward": target.reward.to_dict() if target.reward else None,
        "kl": policy.kl.to_dict() if policy.kl else None,
        "kl_prompts": policy.divergence.prompts if policy.divergence else None,
        "gold": {name: each.to_dict() for name, each in policy.gold.items()} if policy.gold else None,
        "skipped": None,
        "sets": {
            name: {
                **_under(each, policy.label),
                "train_overlap": overlap_of(each.scored[policy.label], policy.trained.keys),
            }
            for name, each in comparison.sets.items()
        },
        "notes": list(policy.trained.notes),
    }


def _under(paired: PairedSet, label: str) -> dict[str, Any]:
    """A set under one policy."""
    changes = paired.changes.get(label)
    calibration = paired.calibration.get(label)
    differences = paired.differences.get(label)
    return {
        "pairs": len(paired.first.chosen),
        "main": paired.main,
        "figures": {name: each.to_dict() for name, each in paired.figures[label].items()},
        "calibration": {
            name: getattr(calibration, name).to_dict() for name in ("ece", "log_loss", "brier", "scale")
        }
        if calibration
        else None,
        "differences": {name: each.to_dict() for name, each in differences.items()} if differences else None,
        "changed": {
            "to_chosen": sum(each.to == "chosen" for each in changes),
            "to_rejected": sum(each.to == "rejected" for each in changes),
        }
        if changes is not None
        else None,
    }


def _set(paired: PairedSet) -> dict[str, Any]:
    return {
        "pairs": len(paired.first.chosen),
        "prompts": paired.prompts,
        "left_out": paired.left_out,
        "dropped": paired.first.held_out.dropped,
        "main": paired.main,
        "data": paired.first.held_out.fingerprint,
    }


def _table(comparison: Comparison) -> str:
    """Long form: a line per figure."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["policy", "set", "measure", "value", "low", "high", "p", "p_holm"])

    def line(policy: Policy, name: str, measure: str, estimate: Estimate, *rest: float) -> None:
        lines.writerow([policy.target.name, name, measure, *(f"{each:.8g}" for each in (*estimate, *rest))])

    for policy in comparison.policies:
        if policy.kl:
            line(policy, "", "kl", policy.kl)
        for dimension, gold in (policy.gold or {}).items():
            line(policy, "", f"gold/{dimension}", gold)
        for name, paired in comparison.sets.items():
            for measure, estimate in paired.figures[policy.label].items():
                line(policy, name, measure, estimate)
            for measure, found in paired.differences.get(policy.label, {}).items():
                line(policy, name, f"difference/{measure}", found.estimate, found.p, found.p_holm)
    return text.getvalue()


def _picture(comparison: Comparison) -> Figure | None:
    """KL against gold reward where it is known of all, else against accuracy on the first set; None without any KL."""
    policies = [each for each in comparison.policies if each.kl]
    name, paired = next(iter(comparison.sets.items()))
    gold = next(iter(policies[0].gold or {}), None) if policies else None
    if gold is not None and all(each.gold and gold in each.gold for each in policies):
        points = [Point(each.label, each.kl, each.gold[gold]) for each in policies if each.kl and each.gold]
        return kl_picture(points, x=KL_AXIS, y=f"gold reward ({gold})")
    points = [
        Point(each.label, each.kl, paired.figures[each.label][f"accuracy/{paired.main}"])
        for each in policies
        if each.kl
    ]
    return kl_picture(points, x=KL_AXIS, y=f"accuracy on {name} (%)", scale=100, even=0.5) if points else None


def _decoder(policy: Policy) -> Decode:
    tokenizer = loading.load_tokenizer(policy.target.source, policy.target.recipe.model)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
