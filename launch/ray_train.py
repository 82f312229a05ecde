"""Starts a run as a Ray Train job, on this machine or on the Ray cluster that RAY_ADDRESS names.

    python launch/ray_train.py CONFIG [key=value ...] [--num-workers N] [--max-failures K]

Without RAY_ADDRESS a Ray of its own is started here and ended with the run; inside `ray job submit` the
cluster is the job's. When a worker dies, all are started again, up to K times, and go on from the run's
latest checkpoint. Ctrl-C and SIGTERM let the run finish its step and save.

Knows Ray; does not know what a training step is.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

# Ray reads these when it is imported. With tokens, only this user can hand work to the Ray that is started here.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from dash_dist.cli import ConfigFile, Overrides, run_app
from dash_dist.training import (
    ConfigError,
    ConsoleProgress,
    RunConfig,
    RunError,
    RunStart,
    RunSummary,
    StepReport,
    load_config,
)
from dash_dist.training.checkpoints import choose_checkpoint
from dash_dist.training.stopping import StopSignal

# How often the driver looks for news of the run, in seconds.
_POLL_SECONDS = 0.2

# Attempts to place the workers, of a minute each: a cluster that lacks a node, and gets none, ends the run.
_PLACEMENT_ATTEMPTS = 10


def ray_train(
    config: ConfigFile,
    overrides: Overrides = None,
    num_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes. Default: as many of the GPUs as the run can use, or tp x cp x pp on CPUs.",
        ),
    ] = None,
    max_failures: Annotated[int, typer.Option(min=0, help="How often to start again when a worker dies.")] = 3,
) -> None:
    """Train with Ray Train."""
    launch(load_config(config, overrides or []), num_workers=num_workers, max_failures=max_failures)


def launch(config: RunConfig, *, num_workers: int | None, max_failures: int) -> None:
    """Run `config` on Ray workers and show its progress here. Raises RunError, or Ray's TrainingFailedError."""
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    console = ConsoleProgress()
    _connect(num_workers or _model_ranks(config))
    try:
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        num_workers = num_workers or default_num_workers(config, gpus)
        _check_world_size(config, num_workers)
        if not os.environ.get("RAY_ADDRESS"):
            check_local_gpus(num_workers, gpus)
        device = "GPU" if gpus else "CPU"
        console.note(f"Ray: {num_workers} {device} workers; the cluster has {cpus} CPUs and {gpus} GPUs")
        # Restarted workers must go on where the first ones got to, whatever the first were told.
        choose_checkpoint(config.run.path / "checkpoints", config.run.resume)
        if config.run.resume == "never":
            config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": config, "mailbox": mailbox, "working_directory": os.getcwd()},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpus > 0),
            run_config=RayRunConfig(
                storage_path=str(config.run.path.absolute() / "ray"),
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=_PLACEMENT_ATTEMPTS),
            ),
            torch_config=TorchConfig(
                backend="nccl" if gpus else "gloo", timeout_s=config.training.distributed_timeout_seconds
            ),
        )
        _fit(trainer, mailbox, console)
    finally:
        console.close()
        ray.shutdown()


def default_num_workers(config: RunConfig, gpus: int) -> int:
    """Workers for a cluster of `gpus` GPUs: the most that the run can use, or its model-parallel ranks on CPUs.

    Raises ConfigError if there are GPUs, but too few for one replica of the model.
    """
    ranks = _model_ranks(config)
    if gpus == 0:
        return ranks
    for workers in range(gpus - gpus % ranks, 0, -ranks):
        try:
            config.check_world_size(workers)
        except ValueError:
            continue
        return workers
    raise ConfigError(
        f"the cluster has {gpus} GPUs, and parallel.tensor x parallel.context x parallel.pipeline = {ranks}: "
        f"lower one of the three, for example parallel.context=1"
    )


def check_local_gpus(num_workers: int, gpus: int) -> None:
    """Refuse, with ConfigError, more workers than this machine has GPUs: Ray would wait for a node that never comes."""
    if num_workers > gpus > 0:
        raise ConfigError(
            f"--num-workers {num_workers}: each worker takes a GPU and this machine has {gpus}: start at most {gpus}, "
            f"or set RAY_ADDRESS to a cluster that has more"
        )


class Mailbox:
    """An actor between the driver and rank 0: news of the run one way, the request to stop the other way."""

    def __init__(self) -> None:
        self._news: list[tuple[str, Any]] = []
        self._stop = False

    def tell(self, kind: str, content: Any) -> None:
        self._news.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """The news since the last call."""
        news, self._news = self._news, []
        return news

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


class MailboxProgress:
    """The ProgressReporter of rank 0: what it is told appears on the driver's console."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def start(self, run: RunStart) -> None:
        self._mailbox.tell.remote("start", run)

    def update(self, report: StepReport) -> None:
        self._mailbox.tell.remote("update", report)

    def note(self, text: str) -> None:
        self._mailbox.tell.remote("note", text)

    def finish(self, summary: RunSummary) -> None:
        self._mailbox.tell.remote("finish", summary)

    def close(self) -> None:
        """Nothing is open here: the driver closes its console."""


def train_worker(job: dict[str, Any]) -> None:
    """One rank. Runs in a worker's thread, with the process group initialised by Ray."""
    import ray
    import torch

    from dash_dist.training import Asked, Request, train

    context = ray.train.get_context()
    mailbox = job["mailbox"]
    is_main = context.get_world_rank() == 0
    # Ray starts workers elsewhere; the paths in the configuration are relative to where the run was launched.
    os.chdir(job["working_directory"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))

    def requests() -> Asked:
        return Asked(Request.STOP) if is_main and ray.get(mailbox.stop_requested.remote()) else Asked()

    try:
        train(job["config"], reporter=MailboxProgress(mailbox), requests=requests)
    except RunError as error:
        # Every rank raises it, and trying again would not help: the driver reports it, and Ray sees the end of the run.
        if is_main:
            ray.get(mailbox.tell.remote("error", error))


def _connect(num_workers: int) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="WARNING", log_to_driver=False)
        return
    ray.init(
        address="local",  # even where a file of an earlier Ray names a cluster that is gone
        num_cpus=max(len(os.sched_getaffinity(0)), num_workers),
        object_store_memory=128 << 20,  # nothing large travels through Ray
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
        _node_ip_address="127.0.0.2",  # loopback; 127.0.0.1 itself would be replaced by the machine's address
    )


def _fit(trainer: Any, mailbox: Any, console: ConsoleProgress) -> None:
    """Run the trainer in a thread and its news through the console here, where signals arrive."""
    import ray

    outcome: dict[str, BaseException] = {}

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    show: dict[str, Callable[[Any], None]] = {
        "start": console.start,
        "update": console.update,
        "note": console.note,
        "finish": console.finish,
    }
    with StopSignal() as stop:
        thread.start()
        asked = False
        running = True
        while running:
            running = thread.is_alive()  # looked at before the news, so that the last of them is not missed
            for kind, content in ray.get(mailbox.take.remote()):
                if kind == "error":
                    raise content
                show[kind](content)
            if stop.requested and not asked:
                asked = True
                console.note("asked to stop: the run finishes its step and saves; once more ends it at once")
                mailbox.ask_to_stop.remote()
            time.sleep(_POLL_SECONDS)
    if "error" in outcome:
        raise outcome["error"]


def _check_world_size(config: RunConfig, num_workers: int) -> None:
    try:
        config.check_world_size(num_workers)
    except ValueError as error:
        raise ConfigError(f"--num-workers {num_workers}: {error}") from None


def _model_ranks(config: RunConfig) -> int:
    parallel = config.parallel
    return parallel.tensor * parallel.context * parallel.pipeline


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(ray_train)
    run_app(command)
