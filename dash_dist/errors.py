"""Errors of a run that are its user's to mend, or may pass by themselves: printed as they are, without a traceback."""

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
    errno.ESTALE,  # what a network file system says of a file after its server was started again
}
_PASSING_STATUSES = {408, 425, 429}  # HTTP: request timeout, too early, too many requests; beside the server's own, 5xx


class RunError(Exception):
    """A run cannot start or go on; the message says what was given and what to change.

    Attributes:
        may_pass: storage or a server did not answer: the same command may go through when it is tried again.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ConfigError(RunError):
    """The configuration is refused."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, found or read."""


def may_pass(error: BaseException) -> bool:
    """Return whether the operation that raised `error` may succeed when tried again.

    Looks at the errors that led to it, too: libraries wrap those of the network in their own.
    """
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(one, RunError):
            return one.may_pass
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
