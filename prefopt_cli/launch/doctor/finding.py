"""One line of an examination: what was found, how bad it is, and what to do about it."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing."""

    state: State
    """ok; note: something is missing or worth knowing; problem: training fails until it is put right."""
    text: str
    remedy: str | None = None
    """What to do, with the command where there is one."""
    feature: str | None = None
    """What fails without it, by a name that recipes' needs go by."""

    def __post_init__(self) -> None:
        if self.state != "ok" and not self.remedy:
            raise ValueError(f"a {self.state} needs a remedy: {self.text}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def needed_by(self, reason: str) -> "Finding":
        """The same where something cannot do without: a note becomes a problem."""
        if self.state != "note":
            return self
        text = self.text if self.text.endswith(reason) else f"{self.text} ({reason} needs it)"
        return replace(self, state="problem", text=text)


def ok(text: str, feature: str | None = None) -> Finding:
    """All is well."""
    return Finding("ok", text, None, feature)


def note(text: str, remedy: str, feature: str | None = None) -> Finding:
    """Worth knowing; a problem only for recipes that need the feature."""
    return Finding("note", text, remedy, feature)


def problem(text: str, remedy: str, feature: str | None = None) -> Finding:
    """Training fails until it is put right."""
    return Finding("problem", text, remedy, feature)


def gibibytes(count: float) -> str:
    """Bytes for people: 79.1 GiB; below one GiB in MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def in_brief(error: BaseException, most: int = 200) -> str:
    """The kind of an error and its first words, in one line."""
    words = " ".join(str(error).split())
    shown = words if len(words) <= most else f"{words[:most]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
