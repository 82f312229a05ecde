"""A run handed to a Ray cluster as a job: checked here first, packed, submitted, followed.

Knows Ray's job interface; does not know what the job does beyond its command line.
"""

import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_dist.cluster.capacity import check_limits
from dash_dist.cluster.limits import Limits
from dash_dist.cluster.working_tree import files_to_pack, pack
from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError, RunError

# `ray job stop` gives the driver this long to let the run finish its step and save, before it kills.
STOP_WAIT_SECONDS = 600

# The oldest Ray that pyproject.toml allows.
_OLDEST_RAY = (2, 50)

_RECONNECT_SECONDS = 2.0


@dataclass(frozen=True)
class Submission:
    """Job to submit: `entrypoint` runs on the cluster, in a copy of `files` of the tree at `root`."""

    job_id: str
    entrypoint: str
    environment: dict[str, str]
    root: Path
    files: list[Path]
    run_directory: Path


def submit_command(
    config: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    limits: Limits,
    exclude: Sequence[str],
    dry_run: bool,
    follow: bool,
) -> int:
    """`dash-dist submit`: returns the exit status. Raises ConfigError and RunError."""
    submission = prepare_submission(
        config,
        overrides,
        limits=limits,
        exclude=exclude,
        root=Path.cwd(),
    )
    if dry_run:
        print(describe(submission, address))
        return 0
    if address is None:
        raise ConfigError("--address is not given: the dashboard of the cluster's head, such as http://head:8265")
    return submit(submission, address, follow=follow, say=print)


def prepare_submission(
    config: Path,
    overrides: Sequence[str],
    *,
    limits: Limits,
    exclude: Sequence[str] = (),
    root: Path,
) -> Submission:
    """Check the run here, before a cluster is asked for anything, and say what would be submitted.

    Args:
        config: file of the run, in the tree at `root`.
        overrides: `key=value` settings.
        limits: of its supervisor.
        exclude: patterns of files to leave out.
        root: the working tree that the job takes along.

    Raises ConfigError.
    """
    run = load_config(config, overrides)
    _check_for_cluster(run)
    check_limits(run, limits)
    files = files_to_pack(root, exclude)
    path = Path(os.path.relpath(config.resolve(), root.resolve()))
    if path not in files:
        raise ConfigError(
            f"{config} is not in the tree that the job takes along, {root}: put it below, for example into configs/"
        )
    environment = {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
    }
    if any(file.parts[:2] == ("kernels", "dash_kernels") for file in files):
        environment["PYTHONPATH"] = "kernels"  # below the job's copy, where its processes start
    return Submission(
        job_id=f"{run.run.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        entrypoint=shlex.join(["python", "-m", "dash_dist.cluster", str(path), *overrides, *limits.arguments()]),
        environment=environment,
        root=root,
        files=files,
        run_directory=run.run.path,
    )


def submit(submission: Submission, address: str, *, follow: bool, say: Callable[[str], None]) -> int:
    """Submit to the cluster whose dashboard is at `address`, and follow the job's log to its end unless told not to.

    Returns the exit status of the job, 0 if it was not followed. Raises RunError if the cluster cannot be reached,
    refuses this client, or cannot take the job.
    """
    client = _connect(address, say)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "working_tree.zip"
        pack(submission.root, submission.files, archive)
        try:
            client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.job_id,
                runtime_env={"working_dir": str(archive), "env_vars": submission.environment},
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"the cluster at {address} does not take the job: {error}") from None
    say(_hints(submission, address))
    return _follow(client, submission.job_id, say) if follow else 0


def describe(submission: Submission, address: str | None) -> str:
    """Describe the job as text, for `--dry-run`."""
    size = sum((submission.root / path).stat().st_size for path in submission.files)
    return "\n".join(
        (
            f"job          {submission.job_id}",
            f"address      {address or 'not given'}",
            f"entrypoint   {submission.entrypoint}",
            f"environment  {json.dumps(submission.environment)}",
            f"working tree {submission.root}: {len(submission.files)} files, {size / (1 << 20):.1f} MiB",
        )
    )


def _check_for_cluster(config: RunConfig) -> None:
    if not config.run.directory.is_absolute():
        raise ConfigError(
            f"run.directory = {config.run.directory} is relative, and the job's working directory is a copy that "
            f"is thrown away: give the path of storage that all nodes share, such as run.directory=/shared/runs"
        )


def _connect(address: str, say: Callable[[str], None]) -> Any:
    import ray
    import requests
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: give the cluster's dashboard, such as http://head:8265")
    # Ray would let these replace the address given.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    try:
        client = JobSubmissionClient(address)
        # Ray's client keeps the cluster's version, and the token's header, to itself.
        version = requests.get(f"{address.rstrip('/')}/api/version", headers=client._headers, timeout=30).json()
    except ray.exceptions.AuthenticationError as error:
        raise RunError(
            f"the cluster at {address} refuses this client: {error.message}\n"
            f"Give the token the head was started with: RAY_AUTH_TOKEN, a file at RAY_AUTH_TOKEN_PATH, or "
            f"~/.ray/auth_token"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"no Ray dashboard answers at {address}: {error}\n"
            f"Is the head running? From another machine, a tunnel to it: ssh -L 8265:127.0.0.1:8265 HEAD, then "
            f"--address http://127.0.0.1:8265"
        ) from None
    running = str(version["ray_version"])
    if tuple(int(part) for part in running.split(".")[:2]) < _OLDEST_RAY:
        oldest = ".".join(map(str, _OLDEST_RAY))
        raise RunError(f"the cluster at {address} runs Ray {running}, and dash-dist needs {oldest} or later: update it")
    if running != ray.__version__:
        say(f"note: the cluster runs Ray {running}, this machine {ray.__version__}")
    return client


def _follow(client: Any, job_id: str, say: Callable[[str], None]) -> int:
    try:
        asyncio.run(_show_log(client, job_id))
    except KeyboardInterrupt:
        say(f"\nno longer following; the job {job_id} continues")
        return 0
    details = client.get_job_info(job_id)
    say(f"job {job_id}: {details.status.value.lower()}" + (f": {details.message}" if details.message else ""))
    if details.driver_exit_code is not None:
        return details.driver_exit_code
    return 0 if details.status.value == "SUCCEEDED" else 1


async def _show_log(client: Any, job_id: str) -> None:
    """Write the job's log to standard output until the job is over; a lost connection is made anew."""
    import aiohttp

    shown = 0
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(job_id):
                fresh = text[max(0, shown - position) :]  # a new connection begins with the beginning of the log
                position += len(text)
                sys.stdout.write(fresh)
                sys.stdout.flush()
                shown = max(shown, position)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            print(f"connection to the log lost ({error}): connecting again", file=sys.stderr)
        try:
            if client.get_job_status(job_id).is_terminal():
                return
        except (RuntimeError, OSError) as error:
            print(f"the cluster does not answer ({error}): trying again", file=sys.stderr)
        await asyncio.sleep(_RECONNECT_SECONDS)


def _hints(submission: Submission, address: str) -> str:
    job, ray_job = submission.job_id, "RAY_AUTH_MODE=token ray job"
    run = submission.run_directory
    return "\n".join(
        (
            f"submitted {job}",
            f"  stop     {ray_job} stop --address {address} {job}    (saves first; killed after {STOP_WAIT_SECONDS} s)",
            f"  follow   {ray_job} logs --address {address} --follow {job}",
            "  resume   the same command: the run continues from its newest checkpoint",
            f"  watch    tensorboard --logdir {run}/tensorboard, or dash-dist report {run}, where {run} is mounted",
        )
    )
