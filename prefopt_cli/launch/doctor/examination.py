"""All sections at once, each in a process of its own, so that one that hangs or crashes spoils no other."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import prefopt_cli
from prefopt_cli.launch.doctor.finding import Finding, note

PATIENCE = 60.0
"""Seconds for one section; the first import of torch from a cold network disk takes its time."""
GRACE = 2.0
"""Seconds between asking a section to end and ending it."""
AGAIN = "run `prefopt doctor` again; if it stays so, look for the cause with {command}"


@dataclass(frozen=True)
class Section:
    """Something to examine."""

    title: str
    name: str
    """As `prefopt_cli.launch.doctor.section` knows it."""
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "prefopt_cli.launch.doctor.section", self.name, *self.arguments]


def sections(recipe: Sequence[str] = (), *, quick: bool = False) -> list[Section]:
    """What there is to examine.

    Args:
        recipe: path and overrides of one that is to be judged too.
        quick: leave out what starts two processes.
    """
    every = [
        Section("Versions", "versions"),
        Section("Machine", "machine"),
        Section("Disks", "disks"),
        Section("Hub", "hub"),
        Section("Devices", "devices"),
        Section("Quantisation", "quantization"),
        Section("Processes", "processes", ("quick",) if quick else ()),
        Section("Recipe", "recipe", tuple(recipe)),
    ]
    return every if recipe else every[:-1]


@dataclass(frozen=True)
class Examined:
    """What was found in a section."""

    title: str
    findings: Sequence[Finding]
    seconds: float


class _Running:
    """A section's process, and a thread that waits for it."""

    def __init__(self, section: Section, patience: float) -> None:
        self.section, self._patience, self._begin = section, patience, time.monotonic()
        self._process = subprocess.Popen(
            section.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        self.result: Examined | None = None
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self) -> None:
        silent = False
        out, err = b"", b""
        try:
            out, err = self._process.communicate(timeout=self._patience)
        except subprocess.TimeoutExpired:
            silent = True
            self.end()
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # one that waits for a dead disk cannot be ended
                out, err = self._process.communicate(timeout=GRACE)
        findings = _findings(out)
        if silent:
            findings.append(self._unanswered(f"no answer within {self._patience:g} s"))
        elif self._process.returncode:
            findings.append(self._unanswered(_last_words(self._process.returncode, err)))
        self.result = Examined(self.section.title, findings, round(time.monotonic() - self._begin, 1))

    def _unanswered(self, why: str) -> Finding:
        command = f"python {' '.join(self.section.command[1:])}"
        return note(f"the examination did not come to its end: {why}", AGAIN.format(command=command))

    def end(self) -> None:
        """Ask it to end, and whatever it started; then make it."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 0.1)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)


def examine(
    sections: Sequence[Section],
    needs: Mapping[str, str] | None = None,
    *,
    patience: float = PATIENCE,
) -> Iterator[Examined]:
    """Examine everything at once; what is found comes in the order of the sections.

    Args:
        sections: what to look at.
        needs: features that a recipe cannot do without, and what in it needs them: their notes become problems.
        patience: seconds for each section.
    """
    running = [_Running(section, patience) for section in sections]
    try:
        for each in running:
            while each.thread.is_alive():
                each.thread.join(0.1)
            assert each.result is not None
            findings = [_judged(finding, needs or {}) for finding in each.result.findings]
            yield Examined(each.result.title, findings, each.result.seconds)
    finally:
        for each in running:
            if each.thread.is_alive():
                each.end()


def _judged(finding: Finding, needs: Mapping[str, str]) -> Finding:
    reason = needs.get(finding.feature or "")
    return finding.needed_by(reason) if reason else finding


def _findings(out: bytes) -> list[Finding]:
    """One a line; the last one may have been cut off."""
    found = []
    for line in out.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            found.append(Finding(**json.loads(line)))
    return found


def _last_words(code: int, err: bytes) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it was killed by {signal.Signals(-code).name}"
        return f"it was killed by signal {-code}"
    lines = err.decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return said[:200] or f"exit code {code}"


def _environment() -> dict[str, str]:
    """Ours, with the package found as it is found here, and nothing taken from the working folder."""
    package = str(Path(prefopt_cli.__file__).parent.parent)
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
