"""Environment that Ray needs before its import, and a driver's connection to a cluster.

Knows Ray's environment variables; does not know what is run.
"""

import os
import socket

from dash_dist.errors import RunError
from dash_dist.extras import require_extra

# Ray allows its processes 30 s to start, which a busy machine may exceed once.
_LOCAL_STARTS = 3

_CONNECT_SECONDS = 20


def prepare() -> None:
    """Set what Ray reads when it is imported; call it before the first `import ray`. What is set already stays.

    Raises ConfigError without the extra `ray`.
    """
    require_extra("ray", "Ray")
    # With tokens, only who holds the token can hand work to Ray.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors without GPUs, such as the driver of a job, leave CUDA_VISIBLE_DEVICES as it is.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # The Ray of one machine: with this switch (its name is that of the systems where it is off by default) the
        # node's address is 127.0.0.1, and then every one of Ray's servers binds to that and to nothing else.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray would give its workers, here the ranks, the priority of background jobs (15).
        os.environ.setdefault("RAY_worker_niceness", "0")


def connect(cpus: int) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start a Ray of `cpus` CPUs on this machine's loopback.

    Raises RunError if the cluster cannot be reached or refuses this client.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _start_local(cpus)
        return
    try:
        _check_reachable(address)
        ray.init(logging_level="WARNING", log_to_driver=False)
    except (OSError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise RunError(
            f"cannot connect to the Ray cluster at RAY_ADDRESS={address}: {error}\n"
            f"Is its head running, is the address right, and is the token the same (RAY_AUTH_TOKEN, "
            f"RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)? Without RAY_ADDRESS a Ray of this machine is started."
        ) from None


def _start_local(cpus: int) -> None:
    import ray

    for attempt in range(_LOCAL_STARTS):
        try:
            ray.init(
                address="local",  # even where a file of an earlier Ray names a cluster that is gone
                num_cpus=cpus,
                object_store_memory=128 << 20,  # nothing large travels through Ray
                include_dashboard=False,
                logging_level="WARNING",
                log_to_driver=False,
            )
            return
        except Exception as error:  # Ray has no type of its own for a start that took longer than the 30 s it allows
            ray.shutdown()
            if attempt + 1 == _LOCAL_STARTS:
                raise RunError(f"Ray cannot be started on this machine: {error}") from error


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at a `host:port`: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
