"""The parts of a run that outlive its stages: its folder, checkpoints, log and attempt.

Knows the order in which a run's folder is prepared; does not know the model or the parallel layout.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from dash_dist.checkpoints.folders import step_of
from dash_dist.config.file import to_yaml
from dash_dist.config.run import RunConfig, Stage
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import ConfigError, RunError
from dash_dist.models.nsa import nsa_parameters
from dash_dist.models.table import parameter_table
from dash_dist.run.files import replace_text
from dash_dist.run.messages import ProgressReporter
from dash_dist.run.requests import RequestsOfRank
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.faults.attempt import begin_attempt
from dash_dist.training.faults.fault_log import FaultLog
from dash_dist.training.faults.lock import RunLock
from dash_dist.training.faults.watchdog import Watchdog, hang_folder
from dash_dist.training.run_data import prepare_data
from dash_dist.training.telemetry.recorder import require_heat_maps


class Session:
    """One attempt of a run at one rank. Every rank makes one; an error at one rank is raised at every rank.

    Args:
        requests: polled between steps.
        cleanup: closes the parts.

    Attributes:
        data: the prepared documents of each stage.
        origin: the checkpoint that the next stage starts from; None for a start from scratch.
        gates_passed: number of the last stage that ended in this process, and so passed its gate; -1 for none.
    """

    def __init__(
        self,
        config: RunConfig,
        reporter: ProgressReporter,
        requests: RequestsOfRank,
        watchdog: Watchdog,
        cleanup: contextlib.ExitStack,
    ) -> None:
        self.gates_passed = -1
        self.config = config
        self.reporter = reporter
        self.requests = requests
        self.watchdog = watchdog
        self.control = ControlGroup(config.training.distributed_timeout)
        stages = config.stage_list
        with self.control.together("the run cannot start", ConfigError):
            config.check_world_size(self.control.size)
            for stage in stages:
                _check_trained_names(stage)
            if self.control.is_main:
                for stage in stages:
                    require_heat_maps(stage.config.logging)
        self.data = prepare_data(stages, self.control, note=self.note, beat=watchdog.beat)
        folder = config.run.path
        cannot_prepare = f"cannot prepare {folder}"
        self.control.on_main(cannot_prepare, RunError, lambda: _lock_folder(folder, reporter.note, cleanup))
        self.checkpoints = CheckpointManager(
            folder,
            self.control,
            keep=config.checkpoint.keep,
            keep_every_hours=config.checkpoint.keep_every_hours,
            asynchronous=config.checkpoint.asynchronous,
        )
        cleanup.callback(self.checkpoints.close)
        self.checkpoints.clean()  # restores a checkpoint that was being replaced: the run may resume from it
        self.origin = self.checkpoints.resume_from(config.run.resume)
        self.log = FaultLog(folder, reporter, is_main=self.control.is_main)
        self.control.on_main(cannot_prepare, RunError, lambda: replace_text(folder / "config.yaml", to_yaml(config)))
        self.attempt = cleanup.enter_context(begin_attempt(folder, self.control, self.log, self.origin))
        with self.control.together(cannot_prepare, RunError):
            watchdog.start(hang_folder(folder, self.attempt.number), self.control.rank)

    @property
    def step(self) -> int:
        """Steps of `origin`, as its folder says."""
        return (self.origin and step_of(self.origin)) or 0

    def go_on(self) -> None:
        """Continue from the run's newest checkpoint. Raises CheckpointError at every rank."""
        self.watchdog.beat()
        self.origin = self.checkpoints.resume_from("auto")
        self.watchdog.beat()

    def note(self, text: str) -> None:
        """Show a text at the main rank."""
        if self.control.is_main:
            self.reporter.note(text)


def _check_trained_names(stage: Stage) -> None:
    """Refuse a pattern of `trainable` that decides on no parameter, before the stages that come before are trained."""
    model, attention = stage.config.model, stage.config.attention
    names = [*parameter_table(model, vocab_size=1), *nsa_parameters(model, attention)]
    try:
        stage.config.trainable.learning_rates(names)
    except ValueError as error:
        raise ConfigError(f"stage {stage.name}: {error}" if stage.name else str(error)) from error


def _lock_folder(folder: Path, note: Callable[[str], None], cleanup: contextlib.ExitStack) -> None:
    """Create the run's folder and lock it until `cleanup`."""
    folder.mkdir(parents=True, exist_ok=True)
    cleanup.enter_context(RunLock(folder, note))
