"""Messages between a run and the script that restarts it (launch/restarts.sh).

Knows two environment variables; does not know why a run ended.
"""

import contextlib
import os
from pathlib import Path

_SINCE = "DASH_DIST_SINCE"
_REFUSED = "DASH_DIST_REFUSED"


def script_started_at() -> float | None:
    """When the script was started, in seconds since 1970; None without one. Attempts since then are its own."""
    since = os.environ.get(_SINCE)
    return None if since is None else float(since)


def tell_refused() -> None:
    """Let the script, if there is one, know that another attempt would end like this one."""
    if path := os.environ.get(_REFUSED):
        with contextlib.suppress(OSError):  # costs attempts that end alike
            Path(path).touch()
