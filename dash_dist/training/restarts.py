"""What a run and the script that starts it again (launch/restarts.sh) tell each other.

Knows two environment variables; does not know why a run ended.
"""

import contextlib
import os
from pathlib import Path

_ATTEMPT = "DASH_DIST_ATTEMPT"
_REFUSED = "DASH_DIST_REFUSED"


def is_restarted() -> bool:
    """Whether an attempt of this run came before, under the same script."""
    return os.environ.get(_ATTEMPT, "0") != "0"


def tell_refused() -> None:
    """Let the script, if there is one, know that another attempt would end like this one."""
    if path := os.environ.get(_REFUSED):
        with contextlib.suppress(OSError):  # costs attempts that end alike
            Path(path).touch()
