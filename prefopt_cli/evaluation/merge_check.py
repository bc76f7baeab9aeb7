"""`prefopt merge`: a run's policy as one plain model, kept only where it gives a sample the run's log-probabilities."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.models import loading, merging
from prefopt_cli.models.ancestry import as_ancestor
from prefopt_cli.models.policy import MERGE_RECORD, PolicySource, merge_record, policy_of_run
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import GPOSettings, LoraAdapter, ModelSettings, Recipe, Source
from prefopt_cli.runs import atomic
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.forward import score_responses
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.batches import examples_of, padding_id
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Reporter

TOLERANCE = 1e-2
"""Nats by which the log-probability of a whole response may differ; float32 stays far below it."""

PAIRS = 64
BATCH_PAIRS = 4


@dataclass(frozen=True)
class MergeSettings:
    """What `prefopt merge` is asked for."""

    dtype: merging.Dtype = "float32"
    pairs: int = PAIRS
    tolerance: float | None = None
    """None: `TOLERANCE`, or none at all where the policy is merged into other weights than it was trained on."""
    data: str | None = None
    """Preferences to compare on in place of the run's own."""
    overwrite: bool = False
    base: merging.Base | None = None
    """What the adapter is merged into, where the weights below it were quantised."""

    def limit(self, into: merging.Base | None) -> float | None:
        """The largest difference that is accepted."""
        return TOLERANCE if self.tolerance is None and into != "original" else self.tolerance


@dataclass(frozen=True)
class Difference:
    """How far the log-probabilities of two policies are apart, in nats."""

    pairs: int
    responses: int
    tokens: int
    max: float
    """Of a whole response; the largest of all."""
    mean: float
    max_per_token: float
    """Of a response divided by its number of tokens; the largest of all."""
    mean_per_token: float


@dataclass(frozen=True)
class Merged:
    """A folder that was written, with the proof."""

    folder: Path
    dtype: str
    record: dict[str, Any]
    difference: Difference
    tolerance: float | None
    """None: any difference was accepted."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": str(self.folder),
            "dtype": self.dtype,
            **{name: self.record[name] for name in ("run", "run_id", "dimension", "base", "adapters")},
            **{name: self.record[name] for name in ("merged_into", "quantization")},
            "tolerance": self.tolerance,
            "difference": asdict(self.difference),
        }


def merge_run(
    place: str, out: Path, settings: MergeSettings, reporter: Reporter, runs: RunFinder | None = None
) -> Merged:
    """Write the policy of a run as a plain model to `out`, unless it scores a sample differently.

    Args:
        place: the run folder.
        out: the folder to make.
        settings: type of the weights, size of the sample, tolerance.
        reporter: told of progress.
        runs: finds a moved run.

    Raises:
        UserError: there is no finished run, its pairs cannot be read, or `out` is in use.
        PrefoptError: the difference is above the tolerance, or nothing can be written; `out` is as it was.
    """
    if merge_record(place) is not None:
        raise UserError(f"{place} is a merged model already (it has a {MERGE_RECORD}).")
    # The record is read from other working directories, too.
    run = RunFolder((runs or RunFinder()).find(place, key="RUN").path.absolute())
    manifest = run.read_manifest()
    source = policy_of_run(run, reporter.progress, key="RUN")
    recipe = load_recipe(run.recipe)
    merging.require_elsewhere(out, run.path, _read(recipe, manifest, source, settings.data))
    merging.require_free(out, overwrite=settings.overwrite)
    model_settings = merging.merge_settings(source, recipe.model)
    config = loading.load_config(source, model_settings)
    into = merging.require_base(source, model_settings, settings.base)
    tokenizer = loading.load_tokenizer(source, model_settings)
    examples = _sample(recipe, run, settings, reporter)
    record = merging.new_record(source, config, _line(run, manifest, source), into)
    limit = settings.limit(into)
    compare = _Comparison(examples, padding_id(tokenizer, config), _device(recipe), reporter)
    before = compare.score(merging.unmerged_policy(source, model_settings), "scoring with the run's policy")
    with atomic.folder(out.absolute()) as folder:
        merging.write_model(
            merging.merged_policy(source, model_settings, into or "dequantized"),
            tokenizer,
            folder,
            dtype=settings.dtype,
            record=record,
        )
        after = compare.score(
            AutoModelForCausalLM.from_pretrained(
                str(folder), dtype="auto", trust_remote_code=recipe.model.trust_remote_code
            ),
            "scoring with the merged model",
        )
        difference = compare.difference(before, after)
        _require_equal(difference, limit, settings.dtype, into)
        record["difference"] = asdict(difference)
        merging.write_record(folder, record, settings.dtype)
    return Merged(out, settings.dtype, record, difference, limit)


class _Comparison:
    """A sample that policies are scored on, one after the other, always in the same padded batches."""

    def __init__(self, examples: Sequence[Example], padding: int, device: str, reporter: Reporter) -> None:
        self.examples = sorted(examples, key=lambda example: -example.longest)
        self.padding = padding
        self.device = device
        self.reporter = reporter

    def score(self, model: nn.Module, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (nats) and numbers of tokens of all responses. The model is let go."""
        layout = Layout()
        logps: list[float] = []
        lengths: list[int] = []
        try:
            layout.prepare(model.to(self.device).eval())
            for start in range(0, len(self.examples), BATCH_PAIRS):
                batch = self.examples[start : start + BATCH_PAIRS]
                inputs = {k: v.to(self.device) for k, v in layout.batch(batch, self.padding).items()}
                with torch.no_grad():
                    scores = score_responses(model, inputs, layout)
                logps += scores.logps.double().tolist()
                lengths += scores.lengths.tolist()
                self.reporter.progress(task, start + len(batch), len(self.examples))
        except torch.OutOfMemoryError as error:
            raise PrefoptError(
                "The accelerator's memory is exhausted by the policy in float32. Hide the accelerator "
                "(CUDA_VISIBLE_DEVICES=) to compare on the processor."
            ) from error
        finally:
            del model  # the caller holds none: the next one needs the room
            gc.collect()
            torch.cuda.empty_cache()
        return np.array(logps), np.array(lengths)

    def difference(
        self, before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
    ) -> Difference:
        """How far two scores of the sample are apart."""
        apart = np.abs(after[0] - before[0])
        per_token = apart / before[1]
        return Difference(
            pairs=len(self.examples),
            responses=len(apart),
            tokens=int(before[1].sum()),
            max=float(apart.max()),
            mean=float(apart.mean()),
            max_per_token=float(per_token.max()),
            mean_per_token=float(per_token.mean()),
        )


def _require_equal(
    found: Difference, limit: float | None, dtype: merging.Dtype, into: merging.Base | None
) -> None:
    if found.max <= (np.inf if limit is None else limit):  # not a number is not
        return
    hint = ""
    if into == "original":
        hint = " The original weights are others than the quantised ones that it was trained on; leave --base out."
    elif dtype != "float32":
        hint = (
            f" {dtype} rounds every weight; if that is what you want, raise --tolerance, or export float32."
        )
    elif into is not None:
        hint = " With weights of a few bits this is their rounding; raise --tolerance if you accept it."
    told = "any number" if limit is None else f"{limit:g}"
    raise PrefoptError(
        f"The merged model is not the run's policy: over {found.responses} responses the log-probabilities differ by "
        f"up to {found.max:.3g} nats ({found.max_per_token:.2g} per token; mean {found.mean:.2g}), and the tolerance "
        f"is {told}. Nothing was written.{hint}"
    )


def _sample(recipe: Recipe, run: RunFolder, settings: MergeSettings, reporter: Reporter) -> list[Example]:
    """Pairs of the eval sets, else of the training data, in the tokens of the run's own tokenizer.

    Raises:
        UserError: they cannot be read.
    """
    held_out = [source for listed in recipe.dataset.eval.values() for source in listed]
    listed = [Source(source=settings.data)] if settings.data else held_out or recipe.dataset.train
    few = {"limit": settings.pairs, "weight": 1.0}  # no more is tokenised than is looked at
    dataset = recipe.dataset.model_copy(
        update={
            "train": [source.model_copy(update=few) for source in listed],
            "eval": {},
            "holdout": None,
            "lists": "all_pairs",
        }
    )
    sample_recipe = recipe.model_copy(
        update={
            "model": ModelSettings(
                name_or_path=str(run.path), trust_remote_code=recipe.model.trust_remote_code
            ),
            "adapter": merging.AS_IT_IS if isinstance(recipe.adapter, LoraAdapter) else "none",
            "dataset": dataset,
            "method": GPOSettings(name="gpo"),
            "training": {},
        }
    )
    try:
        rows = prepare(sample_recipe, reporter).tokens.train
    except UserError as error:
        if settings.data:
            raise
        raise UserError(
            f"The run's own pairs, which the merged model is compared on, cannot be read: {error} "
            "Name other preferences with --data FILE."
        ) from error
    return examples_of(rows.select(range(min(settings.pairs, len(rows)))))


def _line(run: RunFolder, manifest: Mapping[str, Any], source: PolicySource) -> dict[str, Any]:
    """What a later run has to know of this one and of those before it."""
    lineage = manifest.get("lineage", {})
    own = as_ancestor(run, manifest)
    adapters = [*lineage.get("adapters", [])]
    if source.adapter is not None and str(source.adapter) not in adapters:
        adapters.append(str(source.adapter))
    return {
        **{name: own[name] for name in ("run", "run_id", "dimension")},
        "base": lineage.get("base") or lineage.get("origin") or lineage.get("weights"),
        "adapters": adapters,
        "ancestors": [*lineage.get("ancestors", []), own],
    }


def _read(
    recipe: Recipe, manifest: Mapping[str, Any], source: PolicySource, data: str | None
) -> list[str | Path | None]:
    """Places that must not be written over: weights and adapters of the line, and data."""
    lineage = manifest.get("lineage", {})
    sets = [recipe.dataset.train, *recipe.dataset.eval.values()]
    return [
        source.weights,
        source.adapter,
        lineage.get("weights"),
        lineage.get("adapter"),
        *lineage.get("adapters", []),
        *(each["run"] for each in lineage.get("ancestors", [])),
        *(each.source for listed in sets for each in listed),
        data,
    ]


def _device(recipe: Recipe) -> str:
    """Where the run was trained, as far as that is here."""
    return "cuda" if torch.cuda.is_available() and not recipe.training.get("use_cpu") else "cpu"
