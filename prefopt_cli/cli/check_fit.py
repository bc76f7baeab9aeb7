"""How `prefopt check --memory` answers: whether a run fits, and with which settings it would."""

import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.training.inspection import Inspection
    from prefopt_cli.training.memory_fit import Fit, Proposal

UNITS = {
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def read_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``24 GB``, ``24Gi``, ``24G``; units of 1000 and of 1024, in any case.

    Raises:
        UserError: there is no unit, or no number above 0.
    """
    from prefopt_cli.errors import UserError

    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(found[2].lower()) if found else None
    size = round(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise UserError(
            f"--memory: expected a number and its unit (MiB, GiB, MB, GB), for example 24GiB, found {text!r}."
        )
    return size


def print_fit(found: "Inspection", recipe: str, overrides: Sequence[str], console: "Console") -> None:
    """The answer, with a command line where settings must change: that of this check, with its overrides."""
    fit = found.fit
    assert fit is not None

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if fit.as_it_is:
        line(_room(found, fit))
    elif fit.proposal:
        line(f"{_too_much(found, fit)} These settings fit:")
        _print_proposal(fit.proposal, found, console)
        line(f"prefopt train {shlex.join([recipe, *_laid_over(overrides, fit.proposal.overrides)])}")
    elif fit.smallest:
        from prefopt_cli.training.memory import format_bytes

        line(
            f"{_too_much(found, fit)} Nothing fits. What takes the least misses by {format_bytes(fit.missing)}:"
        )
        _print_proposal(fit.smallest, found, console)
    line(f"(Found in {fit.seconds:.1f} s, {fit.estimates} more steps traced.)")


def _laid_over(overrides: Sequence[str], proposed: Sequence[str]) -> list[str]:
    """Both, without those that a proposed one of the same key replaces."""
    replaced = {each.partition("=")[0] for each in proposed}
    return [*(each for each in overrides if each.partition("=")[0] not in replaced), *proposed]


def _room(found: "Inspection", fit: "Fit") -> str:
    from prefopt_cli.training.memory import format_bytes

    needed, size = found.memory.needed, fit.largest_batch
    text = f"{_budget(fit)}: the recipe fits as it is, with {format_bytes(fit.usable - needed)} left."
    if size is not None and size > found.packing.rows:
        text += f" training.per_device_train_batch_size={size} would fit, too."
    if fit.gpus > found.processes:
        text += f" It uses {found.processes} of the {fit.gpus} GPUs; launch.processes is how many each machine uses."
    return text


def _too_much(found: "Inspection", fit: "Fit") -> str:
    from prefopt_cli.training.memory import format_bytes

    if found.processes > fit.gpus:
        return f"{_budget(fit)}: the recipe asks for {found.processes} processes."
    needed = found.memory.needed
    return f"{_budget(fit)}: the recipe as it is needs {format_bytes(needed)}, which is too much."


def _budget(fit: "Fit") -> str:
    from prefopt_cli.training.memory import format_bytes

    gpus = f"{fit.gpus} times " if fit.gpus > 1 else ""
    return f"Budget of {gpus}{format_bytes(fit.memory)}, of which {format_bytes(fit.usable)} may be used"


def _print_proposal(proposal: "Proposal", found: "Inspection", console: "Console") -> None:
    from prefopt_cli.cli.check_memory import print_parts
    from prefopt_cli.training.memory import format_bytes

    for keeps, title in (
        (True, "The result stays the same, up to rounding:"),
        (False, "These change what is trained:"),
    ):
        settings = [setting for setting in proposal.settings if setting.keeps_result == keeps]
        if settings:
            console.print(title)
        for setting in settings:
            console.print(f"  {setting.override}  ({setting.does})", markup=False, soft_wrap=True)
    print_parts(proposal.estimate, found.device, console)
    if proposal.estimate.needed_before > proposal.estimate.total:
        before = format_bytes(proposal.estimate.needed_before)
        holds = "the whole model" if proposal.estimate.whole_before else "a part of the model"
        console.print(f"Before training it needs {before}, with {holds} in each process.", soft_wrap=True)
