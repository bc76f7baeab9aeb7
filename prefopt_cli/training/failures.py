"""Failures that are nobody's mistake in the code, in one sentence each."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.connection import CONNECTION_LOST, is_connection_loss
from prefopt_cli.runs.folder import RunFolder

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NO_SPACE_WORDS = (
    "No space left on device",
    "os error 28",  # safetensors, ENOSPC
    "os error 27",  # safetensors, EFBIG
    "iostream error",  # torch.save
    "PytorchStreamWriter failed writing",
    "inline_container.cc",  # torch.save, closing what it could not write
)
"""safetensors and torch report a full disk in words of their own instead of an OSError with a number."""


@contextmanager
def explained(run: RunFolder) -> Iterator[None]:
    """Turn a full disk, exhausted memory and a lost process into messages that say what to do.

    Raises:
        PrefoptError: in their place.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PrefoptError(
            "The accelerator's memory is exhausted. `prefopt check` shows what takes it; a smaller "
            "training.per_device_train_batch_size (with more gradient_accumulation_steps), "
            "training.gradient_checkpointing: true, a shorter dataset.max_length or a LoRA adapter need less."
        ) from error
    except Exception as error:
        if is_connection_loss(error):
            raise PrefoptError(CONNECTION_LOST) from error
        if not _is_disk_full(error):
            raise
        last = run.last_checkpoint()
        kept = (
            f"The last complete checkpoint, {last}, is kept."
            if last
            else "There is no complete checkpoint yet."
        )
        raise PrefoptError(
            f"No space left on the disk that holds {run.path}. {kept} Free some space (or set "
            "training.save_total_limit), then go on with --resume."
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause, or what it came from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(words in str(error) for words in NO_SPACE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
