"""Keeps a report: JSON in the run folders, and the picture of several policies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.labels import labels
from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prefopt_cli.sandbox.score import Report

EVALUATION = "sandbox"
"""The evaluation's name in a run folder."""

SUMMARY = "summary.json"
PICTURE = "kl_win_rate.png"
FORMATS = (".png", ".svg")


@dataclass(frozen=True)
class Saved:
    """What was written, and what could not be; a report is never lost because a folder is read-only."""

    written: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    """By path, the reason."""

    @contextmanager
    def trying(self, path: Path) -> Iterator[None]:
        """Around the writing of one file."""
        try:
            yield
        except OSError as error:
            self.failed[path] = error.strerror or str(error)
        else:
            self.written.append(path)


def require_picture_path(path: Path) -> None:
    """Fail before the work where the picture could not be written after it.

    Raises:
        UserError: it is neither .png nor .svg, there is no such folder, or a folder has that name.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: the picture is a {' or '.join(FORMATS)} file.")
    folder = path.expanduser().absolute().parent
    if not folder.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}.")
    if path.expanduser().is_dir():
        raise UserError(f"--plot {path}: this is a folder.")


def save(report: "Report", plot: Path | None = None) -> Saved:
    """Write the whole report into ``eval/sandbox/summary.json`` of every run, so that each can be compared.

    A picture is drawn where a path is given for it; of several policies also without one, beside the first summary.
    """
    saved = Saved()
    folders = [
        run.evaluation(EVALUATION)
        for run in (RunFolder(Path(score.name).expanduser()) for score in report.policies)
        if run.is_run()
    ]
    for folder in folders:
        with saved.trying(folder / SUMMARY):
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(folder / SUMMARY, report.to_dict())
    if plot is None and len(report.policies) > 1 and folders:
        plot = folders[0] / PICTURE
    if plot is not None:
        with saved.trying(plot):
            write_picture(report, plot)
    return saved


def write_picture(report: "Report", path: Path) -> None:
    """KL to the base policy against win rate, one point per policy; the same report gives the same bytes."""
    from prefopt_cli.evaluation import kl_picture

    kl_picture.write_picture(draw(report), path)


def draw(report: "Report") -> "Figure":
    """The picture, with intervals as bars."""
    from prefopt_cli.evaluation.kl_picture import Point, kl_picture

    names = labels([score.name for score in (*report.policies, report.opponent)])
    points = [
        Point(names[score.name], score.figures["kl"], score.win_rates[report.dimension])
        for score in report.policies
    ]
    return kl_picture(
        points,
        x="KL to the base policy (nats)",
        y=f"win rate by {report.dimension} against {names[report.opponent.name]} (%)",
        scale=100,
        even=0.5,
    )
