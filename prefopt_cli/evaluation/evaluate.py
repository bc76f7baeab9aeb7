"""`prefopt eval`: held-out preferences under a policy and its reference, and what they say."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefopt_cli.errors import PrefoptError
from prefopt_cli.evaluation.figures import SetFigures, figures_of
from prefopt_cli.evaluation.findings import Finding
from prefopt_cli.evaluation.held_out import HeldOutSet
from prefopt_cli.evaluation.overlap import Trained, changed_since
from prefopt_cli.evaluation.pages.plots import PlotData
from prefopt_cli.evaluation.pages.report import report_page
from prefopt_cli.evaluation.scored import ScoredSet, scored_set
from prefopt_cli.evaluation.set_findings import findings_of
from prefopt_cli.evaluation.statistics import LEVEL
from prefopt_cli.evaluation.targets import Target, require_same_tokens
from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.runs import atomic, environment
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.batches import padding_id
from prefopt_cli.training.frozen_policies import SetScores, score_policy
from prefopt_cli.training.record import now
from prefopt_cli.training.reporting import Reporter

SUMMARY, PAIRS, REPORT = "summary.json", "pairs.jsonl", "report.html"

Logps = Mapping[str, Sequence[Sequence[float]]]
"""By set, for every row the log-probabilities of its responses, in nats."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out about one policy."""

    target: Target
    sets: dict[str, SetFigures]
    findings: tuple[Finding, ...]
    computed: int
    """Log-probabilities that were not in the cache."""
    cached: int
    made: str = field(default_factory=now)

    def to_dict(self) -> dict[str, Any]:
        """The summary, for JSON."""
        reference = self.target.reference
        return {
            "policy": self.target.to_dict(),
            "reference": (
                {
                    "name": reference.name or str(reference.run or reference.weights),
                    "description": reference.describe(),
                }
                if reference
                else None
            ),
            "reward": self.target.reward.to_dict() if self.target.reward else None,
            "level": LEVEL,
            "sets": {name: figures.to_dict() for name, figures in self.sets.items()},
            "findings": [finding.to_dict() for finding in self.findings],
            "scores": {"computed": self.computed, "from_cache": self.cached},
            "made": self.made,
            "versions": environment.versions(),
        }

    def write(self, folder: Path, *, title: str) -> None:
        """Write `pairs.jsonl`, `summary.json` and `report.html`, each atomically.

        Raises:
            PrefoptError: the folder cannot be written.
        """
        summary = self.to_dict()
        page = report_page(
            summary,
            {name: plot_data(each.scored) for name, each in self.sets.items()},
            title=title,
            made=made_by(summary),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            records = (record for figures in self.sets.values() for record in figures.scored.records())
            atomic.write_json_lines(folder / PAIRS, records)
            atomic.write_json(folder / SUMMARY, summary)
            atomic.write_text(folder / REPORT, page)
        except OSError as error:
            raise PrefoptError(f"The evaluation cannot be written to {folder}: {error.strerror}.") from error


def made_by(summary: Mapping[str, Any]) -> str:
    """What made a summary, and when, for its page."""
    when = datetime.datetime.fromisoformat(summary["made"])
    return f"prefopt {summary['versions']['prefopt']}, {when:%Y-%m-%d %H:%M} UTC"


def evaluate(
    target: Target,
    sets: Mapping[str, HeldOutSet],
    reporter: Reporter,
    *,
    trained: Trained,
    stopping: Callable[[], bool] = lambda: False,
    seed: int = 0,
) -> Evaluation:
    """Score the sets with the policy and its reference, and work out all figures.

    Args:
        target: the policy.
        sets: in the tokens of its tokenizer.
        reporter: told of progress.
        trained: the prompts that it was trained on.
        stopping: whether a signal has asked to stop.
        seed: of the resampling.

    Raises:
        UserError: a policy cannot be loaded, or the reference has another tokenizer.
        ScoringStopped: a signal came; what was scored until then is in the cache.
    """
    tokens = {name: each.tokens for name, each in sets.items()}
    if target.reference is not None:
        require_same_tokens(target.source, target.reference, target.recipe)
    own = scores_of(target.source, target, tokens, reporter, "the policy", stopping)
    its = None
    if target.reference is not None:
        its = scores_of(target.reference, target, tokens, reporter, "the reference", stopping)
    found: dict[str, SetFigures] = {}
    for done, (name, held_out) in enumerate(sets.items()):
        reporter.progress("working out the figures", done, len(sets))
        notes = (*changed_since(target.run, held_out), *trained.notes)
        scored = scored_set(held_out, own.logps[name], its.logps[name] if its else None, target.reward)
        found[name] = figures_of(scored, trained.keys, notes, seed=seed)
    reporter.progress("working out the figures", len(sets), len(sets))
    return Evaluation(
        target,
        found,
        tuple(finding for name, figures in found.items() for finding in findings_of(name, figures)),
        computed=sum(each.found.computed for each in (own, its) if each),
        cached=sum(each.found.responses - each.found.computed for each in (own, its) if each),
    )


def scores_of(
    source: PolicySource,
    target: Target,
    tokens: Mapping[str, Dataset],
    reporter: Reporter,
    what: str,
    stopping: Callable[[], bool],
) -> SetScores:
    """Log-probabilities of the sets' responses under a policy that is loaded as the target's recipe says.

    Raises:
        UserError: the policy cannot be loaded.
        ScoringStopped: a signal came.
    """
    recipe = target.recipe
    config = loading.load_config(target.source, recipe.model)
    tokenizer = loading.load_tokenizer(target.source, recipe.model)
    found = score_policy(
        source,
        recipe,
        tokens,
        args=training_arguments(recipe, target.run or RunFolder(Path(recipe.output_dir)), evaluates=False),
        padding_id=padding_id(tokenizer, config),
        reporter=reporter,
        task=f"scoring with {what}",
        stopping=stopping,
    )
    reporter.message(f"Log-probabilities under {what} ({source.describe()}): {found.found.describe()}.")
    return found


def plot_data(scored: ScoredSet) -> PlotData:
    """What the plots of the report show, pair by pair."""
    change = None if scored.reference is None else scored.logps - scored.reference
    return PlotData(
        margins=scored.margins(scored.scores[scored.main]),
        length_differences=scored.margins(scored.tokens),
        policy_deltas=scored.margins(scored.logps),
        reference_deltas=None if scored.reference is None else scored.margins(scored.reference),
        change_chosen=None if change is None else change[scored.chosen],
        change_rejected=None if change is None else change[scored.rejected],
    )
