"""Ray: one started on this machine, or the cluster that is named; and that neither answers a stranger.

Knows Ray's dashboard and jobs. The Ray that is started here listens on the loopback interface only, and ends with the
check.
"""

import importlib.metadata
import importlib.util
import json
import os
import secrets
import shlex
import stat
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from dash_dist.doctor.checks.links import clock_finding
from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, skipped, warning
from dash_dist.doctor.site import Site

_HTTP_SECONDS = 10.0
_TASK_SECONDS = 30.0
_JOB_SECONDS = 90.0
_POLL_SECONDS = 0.5
_MARK = "dash-dist doctor: "  # what the line of node_probe begins with
_OBJECT_STORE_BYTES = 80 << 20
_CLOSE = (
    "Start the head with RAY_AUTH_MODE=token and a token (`ray get-auth-token --generate`): "
    "without it, anyone who reaches the port can run code as you."
)


def token(site: Site) -> list[Finding]:
    """Check that a token exists if a cluster is named, and that only its owner may read its file."""
    name = "Ray token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [ok(name, "in RAY_AUTH_TOKEN")]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        empty = not path.read_text().strip()
    except OSError as error:
        if site.address is None and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            return [skipped(name, f"none at {path}; a Ray of this machine makes its own")]
        return [
            failure(
                name,
                f"{path}: {error.strerror}",
                "Copy the token of the cluster's head to this file, readable by you alone, or set RAY_AUTH_TOKEN. "
                "`ray get-auth-token --generate` makes one for a new cluster.",
            )
        ]
    if empty:
        return [failure(name, f"{path} is empty", "`ray get-auth-token --generate` makes a token.")]
    if mode & 0o077 and all(folder.stat().st_mode & 0o011 for folder in path.absolute().parents):
        text = f"{path} may be read by others (mode {mode:o}), who could run code as you"
        advice = f"chmod 600 {shlex.quote(str(path))}"
        # The Ray of a run on this machine alone ends with the run; a cluster stays.
        return [warning(name, text, advice) if site.address is None else failure(name, text, advice)]
    return [ok(name, f"{path}, readable by its owner alone")]


def ray_answers(site: Site) -> list[Finding]:
    if site.address is None and importlib.util.find_spec("ray") is None:
        return [skipped("Ray", "not installed; `pip install 'dash-dist[ray]'` installs the extra")]
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return _local() if site.address is None else _cluster(site, site.address)


def _local() -> list[Finding]:
    # A token of its own, so that no file is made; and Ray's word for a machine that
    # is no part of a cluster: without it, Ray replaces 127.0.0.1 by the machine's address.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    started = time.monotonic()
    try:
        context = _start_ray()
    except Exception:  # a bare one: Ray gives a node 30 s to start, which a busy machine may need twice
        ray.shutdown()
        context = _start_ray()
    try:
        answer = ray.get(ray.remote(lambda: 40 + 2).remote(), timeout=_TASK_SECONDS)
        seconds = time.monotonic() - started
        refusal = _refuses_strangers(f"http://{context.dashboard_url}")
    finally:
        ray.shutdown()
    if answer != 42:
        return [failure("Ray", f"a task gave {answer}, not 42", "Install Ray again.")]
    return [
        ok("Ray", f"{ray.__version__}: started on loopback, a task answered after {seconds:.1f} s", seconds, "s"),
        refusal,
    ]


def _start_ray() -> Any:
    import ray

    return ray.init(
        address="local",
        num_cpus=1,
        num_gpus=0,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=0,
        logging_level="ERROR",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )


def _refuses_strangers(address: str) -> Finding:
    """A call without a token must be refused."""
    name = "Ray authentication"
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=_HTTP_SECONDS) as response:
            return failure(name, f"{address} answers {response.status} without a token", _CLOSE)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return ok(name, f"{error.code} without a token")
        return warning(name, f"{address} answers {error.code} without a token", "Look at the head's dashboard log.")
    except OSError as error:
        return failure(
            name,
            f"{address} does not answer: {error}",
            "Is the head up, is this its dashboard's port (8265), and does a tunnel or firewall let it through?",
        )


def _cluster(site: Site, address: str) -> list[Finding]:
    refusal = _refuses_strangers(address)
    answer = _probe_nodes(site, address)
    if isinstance(answer, Finding):
        return [refusal, answer]
    findings = [refusal, *(_node(node, site.directory) for node in answer["nodes"])]
    if not answer["writable"]:
        advice = "Set run.directory to storage that all nodes share and this user may write to."
        findings.append(failure("shared directory", f"the head cannot write to {site.directory}", advice))
    reached = [node for node in answer["nodes"] if "offset" in node]
    if len(reached) > 1:
        uncertainty = max(node["uncertainty"] for node in reached)
        findings.append(clock_finding("clocks of the nodes", [node["offset"] for node in reached], uncertainty))
    return findings


def _probe_nodes(site: Site, address: str) -> dict[str, Any] | Finding:
    """Return the answer of `node_probe` as a job of the cluster, or the reason for its absence."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    name = "Ray jobs"
    program = (Path(__file__).parents[1] / "node_probe.py").read_text()
    command = shlex.join(["python", "-c", program, str(site.directory.absolute())])
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=command)
    except (RuntimeError, ConnectionError, ValueError) as error:
        return failure(
            name,
            f"{address} takes no job: {str(error).splitlines()[0]}",
            "Give the address of the head's dashboard (http://HEAD:8265), and the cluster's own token.",
        )
    deadline = time.monotonic() + _JOB_SECONDS
    status = client.get_job_status(job)
    while not status.is_terminal() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        status = client.get_job_status(job)
    log = client.get_job_logs(job)
    if status != JobStatus.SUCCEEDED:
        if not status.is_terminal():
            client.stop_job(job)
        last = log.strip().splitlines()[-1:]
        return failure(
            name,
            f"job {job} is {status} after {_JOB_SECONDS:g} s at most: {' '.join(last)}",
            f"See `ray job logs {job}` and `ray status` on the head: are nodes full or lost?",
        )
    line = next(line for line in log.splitlines() if line.startswith(_MARK))
    return json.loads(line.removeprefix(_MARK))


def _node(node: dict[str, Any], directory: Path) -> Finding:
    """Judge one node's answer about itself."""
    name = f"node {node['address']}"
    if "error" in node:
        return failure(name, node["error"], "See its raylet.out and whether it is alive (`ray list nodes`).")
    versions = ", ".join(f"{package} {version or 'missing'}" for package, version in node["versions"].items())
    text = f"{node['host']}, {node['gpus']:g} GPUs, {versions}"
    if not node["sees_directory"]:
        advice = "Mount the storage of run.directory on every node, at the same path."
        return failure(name, f"{text}; does not see the head's file in {directory}", advice)
    ours = importlib.metadata.version("ray")
    if node["versions"]["ray"] != ours:
        return failure(name, f"{text}; here is ray {ours}", "Install the same Ray on every node and on this machine.")
    if node["versions"]["dash-dist"] is None:
        return warning(name, text, "Install dash-dist on the node, or submit the run with its working tree.")
    return ok(name, f"{text}; sees {directory}", node["gpus"], "GPUs")


CHECKS = (
    Check("Ray token", token, Where.HERE, "`ray get-auth-token --generate` makes a token."),
    Check(
        "Ray",
        ray_answers,
        Where.CHILD,
        "On this machine: see the end of /tmp/ray/session_latest/logs/gcs_server.out, and the free memory and space. "
        "Of a cluster: `ray status` on its head.",
        time_limit=110.0,
    ),
)
