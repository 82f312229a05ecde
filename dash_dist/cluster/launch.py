"""From a configuration to a supervised run on Ray: the driver of a run.

Knows the order of things: connect, decide how many workers, supervise, disconnect.
"""

import os
from pathlib import Path

from dash_dist.cluster.capacity import check_limits, check_local_gpus, default_num_workers
from dash_dist.cluster.environment import connect
from dash_dist.cluster.limits import Limits
from dash_dist.cluster.nodes import CPU_WORKER, GPU_WORKER, alive_nodes
from dash_dist.cluster.ray_cluster import RayCluster
from dash_dist.cluster.supervisor import Supervisor
from dash_dist.config.run import RunConfig
from dash_dist.training.console import ConsoleProgress
from dash_dist.training.stopping import StopSignal


def launch(config: RunConfig, limits: Limits) -> None:
    """Run `config` on the cluster that RAY_ADDRESS names, or on a Ray of this machine, and show its progress here.

    Each worker takes a GPU where the cluster has any, a CPU where it has none. `environment.prepare` must have been
    called before Ray was imported. Raises RunError, and ConfigError for what this cluster can never run.
    """
    import ray

    check_limits(config, limits)
    local = not os.environ.get("RAY_ADDRESS")
    console = ConsoleProgress()
    connect(cpus=max(len(os.sched_getaffinity(0)), limits.num_workers or config.model_ranks))
    try:
        gpus = sum(node.room for node in alive_nodes(GPU_WORKER))
        if local and limits.num_workers is not None:
            check_local_gpus(limits.num_workers, gpus)
        if limits.num_workers is None and (local or gpus == 0):
            limits = limits.with_num_workers(default_num_workers(config, gpus))
        room = gpus or sum(node.room for node in alive_nodes(CPU_WORKER))
        console.note(f"Ray: the cluster has room for {room} {'GPU' if gpus else 'CPU'} workers")
        cluster = RayCluster(
            start_seconds=limits.start_timeout_seconds,
            answer_seconds=limits.answer_timeout_seconds,
        )
        with StopSignal() as stop:
            Supervisor(
                config,
                directory=Path.cwd(),
                limits=limits,
                cluster=cluster,
                console=console,
                stop_requested=lambda: stop.requested,
            ).run()
    finally:
        console.close()
        ray.shutdown()
