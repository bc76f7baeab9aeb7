"""How several processes end."""

import torch
from accelerate import PartialState


def leave_together() -> None:
    """Wait until every process has come here, then take the group apart; nothing without one.

    A process that ends while its group still stands may be aborted by it, and the launcher then stops the others,
    in the middle of whatever they still write.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
