"""What a chain leaves behind beside its runs: what it was, what was done, how far it came."""

from collections.abc import Sequence
from typing import Any

from prefopt_cli.chain.plan import Plan, Step
from prefopt_cli.chain.settings import PLAN_FILE, RESOLVED_FILE
from prefopt_cli.errors import PrefoptError
from prefopt_cli.recipe.dump import dump_data
from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder

FORMAT = 1


def stages_now(plan: Plan, begun: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The planned stages, with how their runs stand.

    Args:
        plan: what is to be done.
        begun: runs that are as the plan wants them: skipped, or begun by it.
    """
    places = [run.path for run in begun]
    return [_stage_now(step) if step.run.path in places else _waiting(step) for step in plan.steps]


def _stage_now(step: Step) -> dict[str, Any]:
    if not step.run.is_run():
        return _waiting(step)
    manifest = step.run.read_manifest()
    return {**step.to_dict(), **{key: manifest.get(key) for key in ("status", "run_id", "step", "steps")}}


def _waiting(step: Step) -> dict[str, Any]:
    return {**step.to_dict(), "status": "waiting"}


def write_record(
    plan: Plan, begun: Sequence[RunFolder], status: str, retention: dict[str, Any] | None
) -> None:
    """Write chain.yaml, the chain with the command line's overrides, and chain.json, its plan and status.

    Args:
        plan: what is to be done.
        begun: see `stages_now`.
        status: of the whole.
        retention: which run and data the retention table is about, if there is one.

    Raises:
        PrefoptError: the folder cannot be written.
    """
    folder, stages = plan.chain.folder, stages_now(plan, begun)
    record = {"format": FORMAT, "status": status, "stages": stages, "retention": retention}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / RESOLVED_FILE, dump_data(plan.chain.data))
        atomic.write_json(folder / PLAN_FILE, record)
    except OSError as error:
        raise PrefoptError(f"{folder} cannot be written: {error.strerror}.") from error
