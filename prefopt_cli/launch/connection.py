"""A connection to another process that is lost: mostly the consequence of what happened to that process."""

CONNECTION_LOST = (
    "The connection to another process was lost: it has ended, or the network between the machines failed. What it "
    "says itself, or its machine, tells why."
)

LOSSES = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Torch's errors of NCCL, of connections and of its store, by name: looking for them must not load torch."""

LOSS_WORDS = (
    "gloo/transport/",  # gloo's own source file, in front of whatever the system says
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "NCCL error",
    "Socket Timeout",
    "wait timeout after",
)


def is_connection_loss(error: BaseException | None) -> bool:
    """Whether a lost connection between processes is the cause, or what it came from."""
    while error is not None:
        if any(kind.__name__ in LOSSES for kind in type(error).__mro__):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOSS_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
