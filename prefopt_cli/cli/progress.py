"""How a run's progress looks: a bar with the time left on a terminal, plain lines elsewhere."""

import time
from typing import TYPE_CHECKING, Any

from prefopt_cli.cli.receipt import print_receipt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

KEY_FIGURES = {
    "loss": "loss",
    "rewards/accuracies": "acc",
    "rewards/margins": "margin",
    "kl/ref": "KL",
    "grad_norm": "grad",
}
"""Metrics worth a place beside the bar, and their short names there."""

SAMPLING_SHARE = "sampling_share"
"""Share of the training time that went into letting the policy write, in [0, 1]."""

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal, how often long work other than training says where it is."""


def figures(metrics: dict[str, Any]) -> str:
    """The key figures of a log record in one line."""
    shown = [f"{short} {metrics[name]:.4g}" for name, short in KEY_FIGURES.items() if name in metrics]
    if SAMPLING_SHARE in metrics:
        shown.append(f"sampling {metrics[SAMPLING_SHARE]:.0%} of the time")
    return "  ".join(shown)


def evaluation_lines(metrics: dict[str, float]) -> list[str]:
    """One line per eval set: its loss, accuracy and margin."""
    ending = "_loss"
    lines = []
    for key in metrics:
        if key.startswith("eval_") and key.endswith(ending):
            prefix = key.removesuffix(ending)
            own = {name: metrics[f"{prefix}_{name}"] for name in KEY_FIGURES if f"{prefix}_{name}" in metrics}
            lines.append(f"{prefix.removeprefix('eval_')}: {figures(own)}")
    return lines


class LineReporter:
    """Plain lines, for logs."""

    def __init__(self, console: "Console", *, receipts: bool = True) -> None:
        self._console = console
        self._receipts = receipts
        self._last_line = time.monotonic()
        self._rate = _Rate()

    def message(self, text: str) -> None:
        """Print the text as it is."""
        self._console.print(text, markup=False, soft_wrap=True)

    def receipt(self, receipt: dict[str, Any]) -> None:
        """Print the receipt's table."""
        if self._receipts:
            print_receipt(receipt, self._console)

    def progress(self, task: str, done: int, total: int) -> None:
        """Print now and then, not at every call."""
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.message(f"{task}: {done} of {total}")

    def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
        """Print the logged steps."""
        left = self._rate.seconds_left(step, total)
        if metrics is not None:
            self.message(
                f"step {step}/{total}  {figures(metrics)}{'' if left is None else f'  left {_clock(left)}'}"
            )

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Print one line per eval set."""
        for line in evaluation_lines(metrics):
            self.message(f"eval {line}")

    def close(self) -> None:
        """Nothing is left open."""


class BarReporter(LineReporter):
    """Bars that redraw in place."""

    def __init__(self, console: "Console", *, receipts: bool = True) -> None:
        super().__init__(console, receipts=receipts)
        self._bars = _bars(console)
        self._tasks: dict[str, Any] = {}
        self._shown = ""

    def progress(self, task: str, done: int, total: int) -> None:
        """Move the bar of this task; it disappears when the work is done."""
        self._move(task, done, total, "")
        if done >= total:
            self._bars.remove_task(self._tasks.pop(task))

    def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
        """Move the training bar; the figures are those logged last."""
        if metrics is not None:
            self._shown = figures(metrics)
        self._move("training", step, total, self._shown)

    def close(self) -> None:
        """Leave the cursor below the bars."""
        self._bars.stop()

    def _move(self, task: str, done: int, total: int, shown: str) -> None:
        self._bars.start()
        if task not in self._tasks:
            # A resumed run starts in the middle; its speed must be that of this session.
            self._tasks[task] = self._bars.add_task(task, total=total, completed=done, figures=shown)
        self._bars.update(self._tasks[task], completed=done, total=total, figures=shown)


def reporter_for(console: "Console", *, receipts: bool = True) -> LineReporter:
    """Bars on a terminal, lines elsewhere; `receipts=False` where the receipt is printed as a result."""
    return (BarReporter if console.is_terminal else LineReporter)(console, receipts=receipts)


def _bars(console: "Console") -> "Progress":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )


class _Rate:
    """Time left, from the steps of this session only."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int, total: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        begun, since = self._first
        return None if step == begun else (now - since) / (step - begun) * (total - step)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
