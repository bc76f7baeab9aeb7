"""What a run tells while it works. The command line draws it; tests and scripts may ignore it."""

from typing import Any, Protocol


class Reporter(Protocol):
    """Receives what happens. Every method may be called from the main thread only."""

    def message(self, text: str) -> None:
        """Something worth a line of its own."""

    def receipt(self, receipt: dict[str, Any]) -> None:
        """What became of the data's rows."""

    def progress(self, task: str, done: int, total: int) -> None:
        """Long work other than training: reading, tokenising, evaluating."""

    def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
        """An optimizer step has ended; with metrics when it was logged."""

    def evaluation(self, metrics: dict[str, float]) -> None:
        """An evaluation has ended."""

    def close(self) -> None:
        """Nothing more will come."""


class Silent(Reporter):
    """A reporter that says nothing."""

    def message(self, text: str) -> None: ...
    def receipt(self, receipt: dict[str, Any]) -> None: ...
    def progress(self, task: str, done: int, total: int) -> None: ...
    def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None: ...
    def evaluation(self, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...
