"""What several processes of a run do alike: decide, hear of signals, end."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch import worker
from prefopt_cli.training.callbacks import StopSignal

T = TypeVar("T")


def decided(decide: Callable[[], T]) -> T:
    """What the main process finds, in all of them: files may look different to each, or change while they look.

    All processes must call it.

    Raises:
        PrefoptError: what `decide` raises in the main process, in all of them.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = decide()
        except PrefoptError as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    value: T = found[0]
    return value


def signal_to_any(stop: StopSignal) -> int | None:
    """The signal that any process has been asked to stop by; all must call it.

    Once there is one, others that come later end none of them.
    """
    received = next((number for number in gather_object([stop.received]) if number is not None), None)
    if received is not None:
        stop.hear(received)
        worker.stay_stopped()
    return received


def leave_together() -> None:
    """Wait until every process has come here, then take the group apart; nothing without one.

    A process that ends while its group still stands may be aborted by it, and the launcher then stops the others,
    in the middle of whatever they still write.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
