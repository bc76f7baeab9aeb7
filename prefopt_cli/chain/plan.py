"""What a chain has to do: each stage's action and its reason, decided by content before anything is trained."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from accelerate import PartialState

from prefopt_cli.chain import content
from prefopt_cli.chain.places import locate_runs, recorded_runs, require_own_run, require_usable_folder
from prefopt_cli.chain.scores import NeededScores, needed_scores
from prefopt_cli.chain.settings import BASE, Chain, ChainStage
from prefopt_cli.errors import UserError
from prefopt_cli.models.adapters import require_stackable
from prefopt_cli.models.loading import load_config, on_meta_device
from prefopt_cli.models.policy import PolicySource, describe_reference, find_policy, policy_of_run
from prefopt_cli.models.quantising import quantised_start
from prefopt_cli.recipe.schema import LoraAdapter, Recipe, SequentialSettings
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.choice import scores_depend_on_batch
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.objectives import find_objective
from prefopt_cli.training.preparation import Prepared, prepare
from prefopt_cli.training.processes import decided
from prefopt_cli.training.reference import evaluates
from prefopt_cli.training.reporting import Reporter

Action = Literal["train", "skip", "resume", "retrain"]


@dataclass(frozen=True)
class Step:
    """What is to be done about one stage."""

    stage: ChainStage
    action: Action
    reason: str
    run: RunFolder
    """Where the stage's run lies, or will."""
    recipe: Recipe
    """The stage's, with its own run and those before it where they lie."""
    reference: str
    """Which policy is the reference."""
    fingerprints: dict[str, str]
    """Of the stage's tokenised sets."""
    scores: list[NeededScores] | None = field(default=None, compare=False)
    """Policies that score the stage's data before it trains, where that was asked."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and chain.json."""
        told: dict[str, Any] = {
            "dimension": self.stage.dimension,
            "action": self.action,
            "reason": self.reason,
            "run": str(self.run.path),
            "reference": self.reference,
        }
        return told if self.scores is None else {**told, "scores": [each.to_dict() for each in self.scores]}


@dataclass(frozen=True)
class Plan:
    """All stages in order."""

    chain: Chain
    steps: tuple[Step, ...]

    @property
    def eval_fingerprints(self) -> dict[str, str]:
        """Of the held-out sets that the retention table is about."""
        return {name: value for name, value in self.steps[-1].fingerprints.items() if name != "train"}


def make_plan(
    chain: Chain, *, reporter: Reporter, runs: RunFinder, overwrite: bool = False, counts_scores: bool = False
) -> Plan:
    """Read all stages' data, look at the runs that are there, and decide; no run is made or changed.

    Args:
        chain: as the file has it.
        reporter: told what happens.
        runs: finds runs that were moved.
        overwrite: whether every stage is to be trained, whatever is there.
        counts_scores: whether to find out which scores the cache holds, for which policies are loaded.

    Raises:
        UserError: a stage cannot be trained as it stands, a run is missing or held by another process, or something
            else lies where one should.
    """
    require_usable_folder(chain)
    found = [None] * len(chain.stages) if overwrite else locate_runs(chain, runs)
    first = chain.stages[0].recipe
    base = find_policy(first.model, reporter.progress)
    base = quantised_start(base, first, load_config(base, first.model))
    planning = _Planning(chain, reporter, overwrite, counts_scores, [(BASE, base)])
    for stage, run in zip(chain.stages, found, strict=True):
        reporter.message(f"Reading the data of stage {stage.dimension}.")
        try:
            planning.add(stage, run)
        except UserError as error:
            raise UserError(f"stage {stage.number}, {stage.dimension}: {error}") from error
    return Plan(chain, tuple(planning.steps))


@dataclass
class _Planning:
    """A plan that is being made, stage by stage."""

    chain: Chain
    reporter: Reporter
    overwrite: bool
    counts_scores: bool
    policies: list[tuple[str, PolicySource | None]]
    """Those before the next stage by name, the base first; None: not trained yet."""
    steps: list[Step] = field(default_factory=list)
    chat_template: str | None = None
    """What a stage hands on to the tokenizer of the next."""

    def add(self, stage: ChainStage, run: RunFolder | None) -> None:
        """Plan the next stage.

        Args:
            stage: as the file has it.
            run: its run, if there is one that counts.

        Raises:
            UserError: it cannot be trained as it stands, or another process is at it.
        """
        own = RunFolder(self.chain.run_folder(stage))
        self.chat_template = stage.recipe.model.chat_template or self.chat_template
        stand_in = content.as_first_stage(stage.recipe, self.chain.stages[0].recipe, self.chat_template)
        prepared = prepare(stand_in, self.reporter)
        self._require_sound_adapter(stage.recipe)
        _require_steady_scores(prepared)
        objective = find_objective(stand_in.method, self.chain.recipe_folder)
        args = training_arguments(stage.recipe, own, evaluates=bool(prepared.tokens.eval))
        fingerprints = prepared.tokens.fingerprints
        # A network disk may not show the same files to all machines.
        run, action, reason = decided(
            lambda: (run, *self._decided(stage, run, fingerprints, objective.figures))
        )
        if run is not None and action in ("skip", "resume"):
            _require_not_held(run)
            at = run
        else:
            at = own
            if own.is_run():
                _require_not_held(own)
                if not self.overwrite:
                    require_own_run(self.chain, stage, reason)
                action, reason = "retrain", "--overwrite was given" if self.overwrite else reason
        recipe = content.with_places(stage.recipe, str(at.path), [str(step.run.path) for step in self.steps])
        scores = None
        if self.counts_scores:
            sets = {"train": prepared.tokens.train, **(prepared.tokens.eval if evaluates(args) else {})}
            scores = [] if action == "skip" else needed_scores(self.policies, recipe, sets, args)
        reference = self._reference(stage)
        self.steps.append(Step(stage, action, reason, at, recipe, reference, fingerprints, scores))
        policy = policy_of_run(at, self.reporter.progress) if action == "skip" else None
        self.policies.append((stage.dimension, policy))

    def _decided(
        self,
        stage: ChainStage,
        run: RunFolder | None,
        fingerprints: dict[str, str],
        figures: dict[str, Any],
    ) -> tuple[Action, str]:
        """The action and why."""
        if run is None:
            return "train", self._why_without_run(stage)
        manifest = run.read_manifest()
        finished = manifest.get("status") == "finished" and run.model.is_dir()
        changes = content.recipe_changes(run, manifest, stage, [step.stage.dimension for step in self.steps])
        changes += content.data_changes(manifest, fingerprints, stage, finished=finished)
        changes += content.function_changes(manifest, figures, stage)
        changes += self._changes_before(manifest)
        changes += content.policy_changes(run, manifest, self.reporter.progress) if finished else []
        if changes:
            return "retrain", "; ".join(changes)
        moved = "" if run.path == self.chain.run_folder(stage) else f"; its run was found in {run.path}"
        if finished:
            return "skip", f"it is finished, and nothing that it depends on has changed{moved}"
        checkpoint = run.last_checkpoint()
        step = checkpoint.name.removeprefix("checkpoint-") if checkpoint else None
        saved = f"there is a checkpoint of step {step}" if step else "there is no checkpoint yet"
        return "resume", f"it was begun and not finished; {saved}{moved}"

    def _require_sound_adapter(self, recipe: Recipe) -> None:
        """Refuse now the adapter of a later stage that does not fit the model, or what the chain starts from."""
        base, settings = self.policies[0][1], recipe.method.alignment
        if not (isinstance(recipe.adapter, LoraAdapter) and isinstance(settings, SequentialSettings)):
            return
        assert base is not None  # the base is there
        before = self.chain.stages[: len(self.steps)]
        stays_adapter = all(isinstance(each.recipe.adapter, LoraAdapter) for each in before)
        if settings.adapter_per_stage == "new" and stays_adapter:
            require_stackable(base, recipe.adapter)
        on_meta_device(replace(base, adapter=None), recipe.model, recipe.adapter)

    def _why_without_run(self, stage: ChainStage) -> str:
        own, run_id = self.chain.run_folder(stage), recorded_runs(self.chain).get(stage.dimension)
        if run_id is None or self.overwrite:
            return "it has not been trained yet"
        return f"its run (run id {run_id}) is not in {own} any more; if it was moved, name the folder with --runs-dir"

    def _changes_before(self, manifest: dict[str, Any]) -> list[str]:
        """Whether the stages before are, or will be, others than those that a run came after."""
        upset = next((step for step in self.steps if step.action != "skip"), None)
        if upset is not None:
            return [f"stage {upset.stage.dimension} before it {_DONE[upset.action]}"]
        start = self.policies[-1][1]
        assert start is not None  # all stages before are skipped, so they are finished
        before = (self.steps[-1].stage.dimension, self.steps[-1].run) if self.steps else None
        return content.start_changes(manifest, start, before)

    def _reference(self, stage: ChainStage) -> str:
        if self.steps:
            last = self.steps[-1]
            return f"the policy that stage {last.stage.dimension} ends with ({last.run.model})"
        assert self.policies[0][1] is not None  # the base is there
        return describe_reference(self.policies[0][1], stage.recipe.adapter)


_DONE = {"train": "is trained", "retrain": "is trained anew", "resume": "goes on"}


def _require_steady_scores(prepared: Prepared) -> None:
    """Refuse now what a later stage, and the retention table, would refuse once the first one is trained."""
    if scores_depend_on_batch(prepared.config, prepared.longest):
        raise UserError(
            "with this model's rotary embeddings a score depends on the longest sequence of its batch, so that earlier "
            "policies cannot score the data. Set dataset.max_length to original_max_position_embeddings of its "
            "config.json or less."
        )


def _require_not_held(run: RunFolder) -> None:
    if PartialState().is_main_process:  # or the processes of this chain would take one another for strangers
        with run.held():
            pass
