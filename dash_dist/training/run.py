"""One run, from its configuration to its summary, stage by stage.

Knows the order of stages and what outlives them; does not know how its processes were started or how a step is
computed.
"""

import contextlib

from dash_dist.config.run import RunConfig, Stage
from dash_dist.distributed.first_failure import FirstFailure
from dash_dist.distributed.process_group import joined_process_group
from dash_dist.errors import ConfigError
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.run.messages import ProgressReporter, RunSummary
from dash_dist.run.requests import Requests, RequestsOfRank, nothing_asked
from dash_dist.training.console import ConsoleProgress
from dash_dist.training.faults.memory import free_memory
from dash_dist.training.faults.permanent import permanent_failures_recorded
from dash_dist.training.faults.watchdog import Watchdog
from dash_dist.training.loop import TrainingLoop
from dash_dist.training.session import Session
from dash_dist.training.stopping import StopSignal


def train(
    config: RunConfig,
    *,
    reporter: ProgressReporter | None = None,
    requests: Requests = nothing_asked,
) -> RunSummary:
    """Train `config` to its last step or to a request to stop. Every process of the run calls it. An
    error at one rank is raised at every rank.

    An initialised process group is used as it is. Otherwise the environment (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT) defines it, and without RANK the process trains alone. Every stage builds its model, optimizer and
    groups anew, from the checkpoint at the end of the one before: its layout and sizes may be others.

    Args:
        reporter: receives progress at rank 0; default: this process's console.
        requests: polled between steps at every rank, in addition to SIGTERM and SIGINT; the largest request counts.

    Returns:
        The summary, identical at every rank.

    Raises:
        ConfigError: the configuration cannot work on these processes or this machine.
        CheckpointError: a checkpoint cannot be written, found or read.
        RunError: the data cannot be read, the loss is no longer finite, or a stage misses its gate.
        RankError: at one rank alone, whose device has no more memory. Every other rank is ended soon.
    """
    reporter = reporter or ConsoleProgress()
    with contextlib.ExitStack() as cleanup:
        # Left last: it also ends a process that hangs while it leaves.
        watchdog = cleanup.enter_context(Watchdog(config.faults.hang_timeout_seconds))
        cleanup.enter_context(joined_process_group(timeout=config.training.distributed_timeout))
        cleanup.enter_context(FirstFailure(ending=watchdog.end_soon))
        cleanup.enter_context(permanent_failures_recorded(config.run.path))
        cleanup.callback(reporter.close)
        stop = cleanup.enter_context(StopSignal())
        session = Session(config, reporter, RequestsOfRank(requests, lambda: stop.requested), watchdog, cleanup)
        while True:
            summary, stopped = _train_stage(session)
            if stopped or summary.steps >= config.training.steps:
                session.attempt.completed(summary.steps, stopped=not summary.completed)
                if session.control.is_main:
                    reporter.finish(summary)
                return summary
            free_memory()  # of the stage that has ended
            session.go_on()


def _train_stage(session: Session) -> tuple[RunSummary, bool]:
    """Train the stage that the run's step is in; returns its summary, and True if the run was asked to stop."""
    stage = _current_stage(session)
    with contextlib.ExitStack() as cleanup:
        try:
            dims = ParallelDims.initialise(stage.config.parallel, timeout=stage.config.training.distributed_timeout)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        cleanup.callback(dims.close)
        loop = TrainingLoop(session, stage, dims, cleanup)
        summary = loop.to_the_end()
        session.gates_passed = stage.number if summary.steps >= stage.last_step else session.gates_passed
        if not loop.stopped and summary.steps < session.config.training.steps:
            dims.disband()  # after an error the other ranks may be in a collective
        return summary, loop.stopped


def _current_stage(session: Session) -> Stage:
    """Return the stage of the run's step. A new process asks the gate of a stage that has just ended again."""
    stages, stage = session.config.stage_list, session.config.stage_at(session.step)
    if stage.number and session.step == stage.first_step:
        before = stages[stage.number - 1]
        if before.gate.is_set and session.gates_passed < before.number:
            return before
    return stage
