"""A Ray cluster on one machine: each node is a raylet with its own loopback address, ports and folder.

Knows how Ray nodes are started, lost, drained and ended; does not know their workload. Clients need its token. Nodes
are children of this process (`ray start --block`), which never imports Ray. Token and addresses stay in the children's
environment, so that other Ray clusters of the machine are unaffected.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.storm.errors import StormError
from tests.storm.processes import alive, describe, end, tree

# Attempts to start a node. Ray gives a raylet 30 seconds to come up, which a busy machine can exceed.
_START_ATTEMPTS = 4

# Output of `ray start --block` when the node has joined the cluster.
_STARTED = "Ray runtime started"

# Some have fixed defaults. A raylet, which has 30 seconds to join, would wait for agents that choose their own ports.
_AGENT_PORTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")

_OBJECT_STORE_BYTES = 80 << 20


class Node:
    """One node: `process` is its `ray start --block`, the parent of its raylet and of Ray's other processes there.

    Args:
        cpus: workers that it takes.
        gpu: number of its GPU on this machine; None without one.
    """

    def __init__(
        self, address: str, folder: Path, process: subprocess.Popen[bytes], *, cpus: int, gpu: int | None
    ) -> None:
        self.address = address
        self.folder = folder
        self.process = process
        self.cpus = cpus
        self.gpu = gpu

    @property
    def log(self) -> Path:
        """Output of `ray start`."""
        return self.folder / "start.log"

    @property
    def raylet(self) -> psutil.Process:
        """The node's raylet. Raises psutil.NoSuchProcess if it is gone."""
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    return process
        raise psutil.NoSuchProcess(self.process.pid, msg=f"the node {self.address} has no raylet")

    @property
    def node_id(self) -> str:
        """Ray's id of the node, in hexadecimal."""
        (flag,) = [word for word in self.raylet.cmdline() if word.startswith("--node_id=")]
        return flag.removeprefix("--node_id=")

    def processes(self) -> list[psutil.Process]:
        """Return Ray's processes and the workers of the node."""
        return tree(psutil.Process(self.process.pid)) if self.process.poll() is None else []


class LocalCluster:
    """Context with a head node without workers, and the nodes that are added.

    Args:
        folder: folder of logs, the token and Ray's files. At most about 50 characters, since it holds sockets.
        dashboard: start the dashboard, which accepts jobs.
        environment: variables for nodes and workers, in addition to those of this process.
    """

    def __init__(self, folder: Path, *, dashboard: bool = False, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        """Nodes that were neither lost nor ended, with the head first."""
        self._dashboard = dashboard
        self._last_number = 1
        token = folder / "ray_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_worker_niceness": "0",  # 15 by default: on a busy machine workers would starve
            **(environment or {}),
        }
        """Environment of the nodes; clients need it to connect."""

    def __enter__(self) -> Self:
        head_address = self._next_address()
        self._port = free_port(head_address)
        dashboard_port = free_port(head_address)
        self.address = f"{head_address}:{self._port}"
        """host:port for RAY_ADDRESS."""
        self.dashboard_url = f"http://{head_address}:{dashboard_port}" if self._dashboard else None
        options = [
            "--head",
            f"--port={self._port}",
            f"--include-dashboard={self._dashboard}",
            f"--dashboard-host={head_address}",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={free_port(head_address)}",  # cannot be turned off, and has a fixed default
        ]
        self._start(head_address, options, cpus=0, gpu=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.nodes):
            self._kill_all(node)
        self.nodes.clear()

    def add_node(self, *, cpus: int, gpu: int | None = None) -> Node:
        """Start another node and wait until it has joined. Raises StormError with its log if it does not.

        Args:
            cpus: workers that it takes; one for a node with a GPU.
            gpu: number of its GPU on this machine; None without one.
        """
        return self._start(self._next_address(), [f"--address={self.address}"], cpus=cpus, gpu=gpu)

    def lose(self, node: Node, *, seconds: float = 60) -> list[str]:
        """Kill the raylet of a node. Its workers and Ray's other processes there must notice and end by themselves.

        Returns descriptions of processes that did not end within `seconds`. They are killed.
        """
        processes = node.processes()
        node.raylet.kill()
        deadline = time.monotonic() + seconds
        while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline:
            node.process.poll()
            time.sleep(0.1)
        self.nodes.remove(node)
        descriptions = [describe(process) for process in left]
        end(lambda: [process for process in left if alive(process)])
        node.process.wait(timeout=30)
        return descriptions

    def drain(self, node: Node, *, seconds: int) -> None:
        """Announce the removal of the node in `seconds`."""
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken back by its owner"]
        done = self.run(
            ["ray", "drain-node", f"--address={self.address}", f"--node-id={node.node_id}", *reason]
            + [f"--deadline-remaining-seconds={seconds}"],
        )
        if done.returncode != 0:
            raise StormError(f"the node {node.address} was not drained:\n{done.stdout}")

    def run(
        self,
        command: list[str],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        seconds: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client's command in the environment of the cluster, with the changes in `environment`."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def processes(self) -> list[psutil.Process]:
        """Return the processes of all nodes."""
        return [process for node in self.nodes for process in node.processes()]

    def _next_address(self) -> str:
        self._last_number += 1
        return f"127.0.0.{self._last_number}"

    def _start(self, address: str, options: list[str], *, cpus: int, gpu: int | None) -> Node:
        for attempt in range(1, _START_ATTEMPTS + 1):
            folder = self.folder / f"n{address.rpartition('.')[2]}"
            folder = folder.with_name(f"{folder.name}_{attempt}") if attempt > 1 else folder
            folder.mkdir()
            command = [*start_command(address, folder, cpus=cpus, gpu=gpu), *options]
            environment = {**self.environment, **gpu_environment(gpu)}
            with (folder / "start.log").open("wb") as log:
                process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            node = Node(address, folder, process, cpus=cpus, gpu=gpu)
            while process.poll() is None:
                if _STARTED in node.log.read_text(errors="replace"):
                    self.nodes.append(node)
                    return node
                time.sleep(0.1)
            self._kill_all(node)
        raise StormError(f"the node {address} did not start:\n{node.log.read_text(errors='replace')}")

    def _kill_all(self, node: Node) -> None:
        """Kill all processes of the node within seconds, including those that `ray start` would leave."""
        processes = node.processes()
        end(lambda: [process for process in processes if alive(process)])
        node.process.wait(timeout=30)


def start_command(address: str, folder: Path, *, cpus: int, gpu: int | None) -> list[str]:
    """Return the part of a node's command that heads and other nodes share."""
    return [
        *("ray", "start", "--block", "--log-style=record"),
        *(f"--node-ip-address={address}", f"--temp-dir={folder}", f"--num-cpus={cpus}"),
        f"--num-gpus={0 if gpu is None else 1}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        *("--min-worker-port=0", "--max-worker-port=0"),  # any free port, not one range for all nodes
        *(f"--{name}-port={free_port(address)}" for name in _AGENT_PORTS),
        "--include-log-monitor=false",
    ]


def gpu_environment(gpu: int | None) -> dict[str, str]:
    """Return the variables that show a node its GPU, from whose value Ray takes the name of the GPU."""
    return {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}


def free_port(address: str) -> int:
    """Return a port that is free at `address`, outside the range of Ray's workers."""
    while True:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port
