"""Keeps a report: JSON in the run folders, and the picture of several policies."""

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt_cli.errors import UserError
from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.sandbox.score import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATION = "sandbox"
"""The evaluation's name in a run folder."""

PICTURE = "kl_win_rate.png"
DOTS_PER_INCH = 150


def write_summaries(report: Report) -> list[Path]:
    """``eval/sandbox/summary.json`` of every run in the report: the whole report, so that it can be compared."""
    written = []
    for score in report.policies:
        run = RunFolder(Path(score.name).expanduser())
        if run.is_run():
            folder = run.evaluation(EVALUATION)
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(folder / "summary.json", report.to_dict())
            written.append(folder / "summary.json")
    return written


def require_picture_path(path: Path) -> None:
    """Fail before the work where the picture could not be written after it.

    Raises:
        UserError: no .png, or there is no such folder.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: the picture is a .png file.")
    if not path.expanduser().absolute().parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}.")


def write_picture(report: Report, path: Path | None) -> Path:
    """KL to the base policy against win rate, one point per policy; ``path`` None: beside the first summary.

    Raises:
        UserError: no path was given and the first policy is no run.
    """
    if path is None:
        run = RunFolder(Path(report.policies[0].name).expanduser())
        if not run.is_run():
            raise UserError("Say with --plot where the picture is to go: the first policy is no run folder.")
        path = run.evaluation(EVALUATION) / PICTURE
    with atomic.file(path.expanduser()) as unfinished:
        draw(report).savefig(unfinished, format="png", dpi=DOTS_PER_INCH)
    return path


def draw(report: Report) -> "Figure":
    """The picture, with intervals as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for score in report.policies:
        kl, won = score.figures["kl"], score.win_rates[report.dimension]
        axes.errorbar(
            kl.value,
            100 * won.value,
            xerr=[[kl.value - kl.low], [kl.high - kl.value]],
            yerr=[[100 * (won.value - won.low)], [100 * (won.high - won.value)]],
            fmt="o",
            capsize=2,
        )
        axes.annotate(
            Path(score.name).name or score.name,
            (kl.value, 100 * won.value),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=8,
        )
    axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("KL to the base policy (nats)")
    axes.set_ylabel(f"win rate by {report.dimension} against {report.opponent.name} (%)")
    axes.grid(alpha=0.2)
    return figure
