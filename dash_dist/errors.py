"""Errors that a user can mend or that may pass by themselves; commands print them without a traceback.

Knows the errors and which of them may pass; does not know who raises them.
"""

import errno
import socket

_PASSING_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOLINK,
    errno.ENOTCONN,  # a FUSE mount whose server died
    errno.EREMOTEIO,
    errno.ESTALE,  # a file handle from before a network file server restarted
}
_PASSING_STATUSES = {408, 425, 429}  # HTTP: request timeout, too early, too many requests; 5xx in addition


class RunError(Exception):
    """Failure of a run to start or continue; the message gives the value and the change to make.

    Attributes:
        retryable: storage or a server did not answer, and the same command may succeed later.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class RankError(RunError):
    """Failure of one rank alone, while the others go on; every other RunError is raised at all ranks."""


class ConfigError(RunError):
    """Refusal of a configuration."""


class CheckpointError(RunError):
    """Failure to write, find or read a checkpoint."""


def retryable(error: BaseException) -> bool:
    """Return whether the operation that raised `error` may succeed when tried again.

    Checks the errors that caused it as well, because libraries wrap network errors in their own.
    """
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(one, RunError):
            return one.retryable
        if isinstance(one, ConnectionError | TimeoutError):
            return True
        if isinstance(one, socket.gaierror):
            return one.errno == socket.EAI_AGAIN
        if isinstance(one, OSError) and one.errno in _PASSING_ERRNOS:
            return True
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status >= 500 or status in _PASSING_STATUSES
        one = one.__cause__ if one.__suppress_context__ else one.__context__
    return False
