"""Where a chain's runs lie: in its own folder, or where they were moved to."""

import json
from pathlib import Path
from typing import Any

from prefopt_cli.chain.settings import PLAN_FILE, RETENTION_FILES, Chain, ChainStage
from prefopt_cli.errors import UserError
from prefopt_cli.models.ancestry_checks import ancestors_of
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder


def require_usable_folder(chain: Chain) -> None:
    """Refuse a folder that cannot hold a chain.

    Raises:
        UserError: it is a run itself, or cannot be written, or something else lies where a stage's run should.
    """
    folder = RunFolder(chain.folder)
    if folder.is_run():
        raise UserError(
            f"output_dir {chain.folder} is a run of `prefopt train`. A chain keeps its stages' runs in folders below "
            "its own; choose another output_dir."
        )
    folder.require_writable()
    for stage in chain.stages:
        run = RunFolder(chain.run_folder(stage))
        run.require_writable()
        run.require_free(overwrite=True)


def locate_runs(chain: Chain, runs: RunFinder) -> list[RunFolder | None]:
    """Every stage's run, None where it has none yet.

    Raises:
        UserError: one that a later stage was trained from is neither in its place nor found elsewhere.
    """
    known = recorded_runs(chain)
    return [_locate(chain, stage, runs, known.get(stage.dimension)) for stage in chain.stages]


def require_own_run(chain: Chain, stage: ChainStage, reason: str) -> None:
    """Refuse to replace a run that the chain has never taken for its own.

    Args:
        chain, stage: whose folder holds the run.
        reason: why the run is not what the stage wants.

    Raises:
        UserError: chain.json says nothing of the stage.
    """
    if stage.dimension in recorded_runs(chain):
        return
    raise UserError(
        f"{chain.run_folder(stage)} holds a run that this chain did not make and cannot use, because {reason}. Move it "
        "away, or choose another output_dir; --overwrite replaces it, and trains all stages anew."
    )


def recorded_runs(chain: Chain) -> dict[str, str | None]:
    """The run ids in chain.json by dimension; None for a stage that had not begun when it was written."""
    stages = read_record(chain).get("stages")
    known = [each for each in stages if isinstance(each, dict)] if isinstance(stages, list) else []
    return {str(each.get("dimension")): each.get("run_id") for each in known}


def read_record(chain: Chain) -> dict[str, Any]:
    """chain.json as the last run of the chain left it; empty where there is none that can be read."""
    return _read(chain.folder / PLAN_FILE)


def read_table(chain: Chain) -> dict[str, Any]:
    """The retention table that the chain keeps; empty where there is none that can be read."""
    return _read(chain.folder / RETENTION_FILES[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _locate(chain: Chain, stage: ChainStage, runs: RunFinder, recorded: str | None) -> RunFolder | None:
    own = RunFolder(chain.run_folder(stage))
    wanted = _wanted_by_later_stages(chain, stage)
    if own.is_run() and (wanted is None or wanted["run_id"] == own.read_manifest().get("run_id")):
        return own
    if wanted is None:  # no stage has come after it yet
        moved = recorded is not None and runs.folder is not None
        return _found(runs, str(own.path), recorded) if moved else None
    elsewhere = _found(runs, str(wanted.get("run")), wanted["run_id"])
    if (
        elsewhere is not None or own.is_run()
    ):  # that one is not what later stages came from: the plan trains them anew
        return elsewhere or own
    where = f"neither in {own.path} nor below {runs.folder}" if runs.folder else f"not in {own.path}"
    raise UserError(
        f"stage {stage.number}, {stage.dimension}: later stages were trained from its run (run id {wanted['run_id']}), "
        f"which is {where}. If it was moved, name the folder that it lies in now with --runs-dir. --overwrite trains "
        "all stages anew."
    )


def _found(runs: RunFinder, place: str, run_id: str | None) -> RunFolder | None:
    try:
        return runs.find(place, run_id)
    except UserError:
        return None


def _wanted_by_later_stages(chain: Chain, stage: ChainStage) -> dict[str, Any] | None:
    """What the next later stage with a run says about the stage's run, from which it was trained."""
    for later in chain.stages[stage.number :]:
        run = RunFolder(chain.run_folder(later))
        if not run.is_run():
            continue
        for ancestor in ancestors_of(run.read_manifest()):
            if ancestor.get("dimension") == stage.dimension and ancestor.get("run_id"):
                return ancestor
    return None
