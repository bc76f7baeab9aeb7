"""Implicit reward margins of earlier stages, for every pair of a stage's data, before it trains."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig

from prefopt_cli.losses.sequential import margins_of_ratios
from prefopt_cli.models.ancestry import Ancestry
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.training.batches import PREVIOUS_MARGINS, padding_id
from prefopt_cli.training.extent import row_lengths
from prefopt_cli.training.frozen_policies import score_policy
from prefopt_cli.training.preparation import Prepared
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.trainer import REFERENCE_COLUMNS


def with_previous_margins(
    prepared: Prepared,
    ancestry: Ancestry,
    recipe: Recipe,
    args: DPOConfig,
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> Prepared:
    """The data with `PREVIOUS_MARGINS`, a list of dR_1 ... dR_{n-1} for each pair.

    Args:
        prepared: the run's data, with the reference's log-probabilities.
        ancestry: the earlier stages.
        recipe: of the run.
        args: its training arguments.
        reporter: told of progress.
        stopping: whether a signal has asked the run to stop.

    Raises:
        UserError: a policy cannot be loaded.
        ScoringStopped: a signal came; what was scored until then is in the cache.
    """
    tokens = prepared.tokens
    sets = {"train": tokens.train, **tokens.eval}
    logps: dict[str, list[Tensor]] = {name: [] for name in sets}
    for name, source in ancestry.earlier:
        found = _score(name, source, recipe, prepared, sets, args, reporter, stopping)
        for each, rows in found.items():
            logps[each].append(rows)
    margined: dict[str, Dataset] = {}
    for each, rows in sets.items():
        reference = [torch.tensor(rows[column][:], dtype=torch.float64) for column in REFERENCE_COLUMNS]
        margins = previous_margins([*logps[each], torch.stack(reference, 1)], _lengths(rows), ancestry)
        margined[each] = rows.add_column(PREVIOUS_MARGINS, margins.tolist())
    return replace(prepared, tokens=replace(tokens, train=margined.pop("train"), eval=margined))


def previous_margins(logps: Sequence[Tensor], lengths: Tensor, ancestry: Ancestry) -> Tensor:
    """dR_1 ... dR_{n-1} (B, n-1).

    Args:
        logps: (B, 2) log-probabilities of chosen and rejected under pi_0 ... pi_{n-1}, in nats.
        lengths: (B, 2) their response tokens, for stages that trained on log-ratios per token.
        ancestry: the n-1 earlier stages.
    """
    ratios = []
    for stage, before, after in zip(ancestry.stages, logps[:-1], logps[1:], strict=True):
        sides = (after - before) / (lengths if stage.length_normalize else 1)
        ratios.append(sides[:, 0] - sides[:, 1])
    betas = [stage.beta for stage in ancestry.stages]
    return torch.stack(margins_of_ratios(ratios, betas, [stage.lambdas for stage in ancestry.stages]), 1)


def _score(
    name: str,
    source: PolicySource,
    recipe: Recipe,
    prepared: Prepared,
    sets: dict[str, Dataset],
    args: DPOConfig,
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> dict[str, Tensor]:
    """(B, 2) log-probabilities of every set under one earlier policy."""
    found = score_policy(
        source,
        recipe,
        sets,
        args=args,
        padding_id=padding_id(prepared.tokenizer, prepared.config),
        reporter=reporter,
        task=f"scoring with the policy {name}",
        stopping=stopping,
    )
    reporter.message(f"Log-probabilities under the policy {name}: {found.found.describe()}.")
    return {
        each: torch.tensor(rows, dtype=torch.float64).reshape(-1, 2) for each, rows in found.logps.items()
    }


def _lengths(rows: Dataset) -> Tensor:
    """(B, 2) response tokens."""
    return torch.from_numpy(row_lengths(rows)[:, 1:]).double()
