"""The training loop of one run, from its configuration to its summary.

Knows the interfaces of its parts and the order of their setup; does not know how its processes were started or how a
step is computed.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from dash_dist.config.file import to_yaml
from dash_dist.config.run import RunConfig
from dash_dist.data.prepare import prepare_together
from dash_dist.data.stream import Batch, DataStream, build_data_stream, check_sizes
from dash_dist.data.tokenizer import Tokenizer, load_tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import StepResult
from dash_dist.engine.ranks import Dims
from dash_dist.errors import ConfigError, RunError
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.run.curve_names import pages
from dash_dist.run.files import replace_text
from dash_dist.run.messages import ProgressReporter, RunStart, RunSummary, StepReport
from dash_dist.run.requests import Request, Requests, RequestsOfRank, nothing_asked
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.console import ConsoleProgress
from dash_dist.training.engines import build_engine
from dash_dist.training.faults.attempt import begin_attempt
from dash_dist.training.faults.fault_log import FaultLog
from dash_dist.training.faults.lock import RunLock
from dash_dist.training.faults.permanent import permanent_failures_recorded
from dash_dist.training.faults.recovery import LossRecovery
from dash_dist.training.faults.watchdog import Watchdog, hang_folder
from dash_dist.training.heldout import HeldOut, in_words
from dash_dist.training.pace import Pace
from dash_dist.training.position import RunPosition
from dash_dist.training.saving import Saver
from dash_dist.training.schedule import describe_change
from dash_dist.training.stopping import StopSignal
from dash_dist.training.telemetry.curves import Curves
from dash_dist.training.telemetry.device import memory_used, peak_bf16_flops
from dash_dist.training.telemetry.metrics import MetricsWriter, StepMetrics
from dash_dist.training.telemetry.recorder import Telemetry, over_ranks, require_heat_maps


def train(
    config: RunConfig,
    *,
    reporter: ProgressReporter | None = None,
    requests: Requests = nothing_asked,
) -> RunSummary:
    """Train `config` to its last step or to a request to stop. Every process of the run calls it. An
    error at one rank is raised at every rank.

    An initialised process group is used as it is. Otherwise the environment (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT) defines it, and without RANK the process trains alone.

    Args:
        reporter: receives progress at rank 0; default: this process's console.
        requests: polled between steps at every rank, in addition to SIGTERM and SIGINT; the largest request counts.

    Returns:
        The summary, identical at every rank.

    Raises:
        ConfigError: the configuration cannot work on these processes or this machine.
        CheckpointError: a checkpoint cannot be written, found or read.
        RunError: the data cannot be read, or the loss is no longer finite.
    """
    reporter = reporter or ConsoleProgress()
    with permanent_failures_recorded(config.run.path), contextlib.ExitStack() as cleanup:
        # Left last: it also ends a process that hangs while it leaves.
        watchdog = cleanup.enter_context(Watchdog(config.faults.hang_timeout_seconds))
        try:
            dims = ParallelDims.initialise(config.parallel, timeout=config.training.distributed_timeout)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        cleanup.callback(dims.close)
        cleanup.callback(reporter.close)
        stop = cleanup.enter_context(StopSignal())
        run = _Run(config, dims, reporter, RequestsOfRank(requests, lambda: stop.requested), watchdog, cleanup)
        return run.to_the_end()


class _Run:
    """The parts of one run at one rank; `cleanup` closes them."""

    def __init__(
        self,
        config: RunConfig,
        dims: ParallelDims,
        reporter: ProgressReporter,
        requests: RequestsOfRank,
        watchdog: Watchdog,
        cleanup: contextlib.ExitStack,
    ) -> None:
        self._config = config
        self._dims = dims
        self._reporter = reporter
        self._requests = requests
        self._watchdog = watchdog
        self._tokens_per_step = config.training.global_batch_size * config.training.sequence_length  # with padding
        self._control = ControlGroup(config.training.distributed_timeout)
        self._tensorboard = config.run.path / "tensorboard"
        with self._control.together("the run cannot start", ConfigError):
            config.check_world_size(dims.world_size)
            if self._control.is_main:
                require_heat_maps(config.logging)
        tokenizer, damage, data = _open_data(config, dims, self._control, self._note, watchdog.beat)
        vocab_size = config.model.embedded_tokens(tokenizer.vocab_size)
        self._heldout: HeldOut | None = None
        if config.evaluation.interval is not None:
            self._heldout = HeldOut(config, tokenizer, dims, self._control, note=self._note, beat=watchdog.beat)
        cannot_prepare = f"cannot prepare {config.run.path}"
        self._control.on_main(cannot_prepare, RunError, lambda: _lock_folder(config.run.path, reporter.note, cleanup))
        self._checkpoints = CheckpointManager(
            config.run.path,
            self._control,
            keep=config.checkpoint.keep,
            keep_every_hours=config.checkpoint.keep_every_hours,
            asynchronous=config.checkpoint.asynchronous,
        )
        cleanup.callback(self._checkpoints.close)
        self._checkpoints.clean()  # restores a checkpoint that was being replaced: the run may resume from it
        origin = self._checkpoints.resume_from(config.run.resume)
        self._log = FaultLog(config.run.path, reporter, is_main=self._control.is_main)
        self._control.on_main(
            cannot_prepare, RunError, lambda: replace_text(config.run.path / "config.yaml", to_yaml(config))
        )
        self._attempt = cleanup.enter_context(begin_attempt(config.run.path, self._control, self._log, origin))
        with self._control.together(cannot_prepare, RunError):
            watchdog.start(hang_folder(config.run.path, self._attempt.number), dims.rank)
        with self._control.together("the model cannot be built", ConfigError):
            self._engine = build_engine(config, dims, vocab_size, resumed=origin is not None)
        schedule = config.optimizer.schedule(config.training.steps)
        self._position = RunPosition(self._engine, data, dims, self._control, schedule)
        self._data = data
        changes, data_changes = ([], []) if origin is None else self._position.load(self._checkpoints, origin)
        self._saver = Saver(
            self._checkpoints,
            self._engine,
            self._log,
            watchdog.beat,
            interval=config.checkpoint.interval,
            max_failures=config.faults.max_failed_saves,
            time_limit=config.faults.save_timeout_seconds,
            saved_step=None if origin is None else self._state.step,
        )
        self._recovery = LossRecovery(
            config,
            self._position,
            self._checkpoints,
            self._saver,
            self._control,
            self._log,
            start=None if origin is None else (origin, self._state.step),
            beat=watchdog.beat,
            undone=self._continue_curves,
        )
        self._is_new = origin is None
        self._peak_flops = peak_bf16_flops(dims.device)
        self._density: dict[int, float] = {}
        self._pace = Pace(self._state.step, config.training.steps)
        self._curves: Curves | None = None
        if self._control.is_main:
            self._reporter.start(
                RunStart(
                    name=config.run.name,
                    layout=dims.describe(),
                    start_step=self._state.step,
                    steps=config.training.steps,
                    tokens_per_step=self._tokens_per_step,
                    resumed_from=origin,
                )
            )
            for stepped_over in self._checkpoints.stepped_over:
                self._reporter.note(stepped_over)
            if changes:
                self._reporter.note(f"not the function of the checkpoint: {'; '.join(changes)}")
            self._curves = self._log.curves = Curves(
                self._tensorboard,
                start_step=self._state.step,
                describe=self._describe,
                on_failure=lambda reason: self._log.record("metrics_failed", reason, step=self._state.step),
            )
            cleanup.callback(self._curves.close)
            self._log.draw(self._state.step)
        change = describe_change(self._position.schedule_before, schedule, self._state.step + 1)
        if change is not None and self._state.step < config.training.steps:
            self._log.record("schedule_changed", change, step=self._state.step)
        if self._engine.optimizer_changes:
            self._log.record("trainable_changed", "; ".join(self._engine.optimizer_changes), step=self._state.step)
        for change in data_changes:
            self._log.record("data_changed", change, step=self._state.step)
        if origin is None or data_changes:
            for told in damage:
                self._log.record("data_damaged", told, step=self._state.step)
        self._telemetry = Telemetry(config, self._engine.telemetry, self._curves)

    def to_the_end(self) -> RunSummary:
        """Train to the last step or to a request to stop, and save a checkpoint there."""
        steps = self._config.training.steps
        if self._state.step >= steps:
            self._log.note(
                f"run {self._config.run.name} is complete at step {self._state.step}: "
                f"set run.name=... to train anew or training.steps=... to go on"
            )
        if self._is_new and self._config.faults.spike_z_score is not None:
            # A spike may come before the first regular checkpoint.
            with self._saving():
                self._saver.start(self._state, self._position.data_state)
                self._saver.settle(self._state.step)
        while self._state.step < steps:
            self._watchdog.beat()
            micro_batches = self._next_batches()
            if micro_batches is None:
                break
            if self._recovery.should_skip(self._state.step + 1):
                self._position.skip_batch(micro_batches)
                self._pace.go_to(self._state.step)
                self._evaluate_if_due()
            else:
                self._step(micro_batches)
            if self._saver.is_due(self._state):
                with self._saving():
                    self._saver.start(self._state, self._position.data_state)
        self._saver.save_at_the_end(self._state, self._position.data_state)
        summary = self._summary()
        self._attempt.completed(self._state.step, stopped=not summary.completed)
        if self._curves is not None and summary.completed:
            self._curves.write(self._state.step, lambda writer: writer.finished())
        if self._control.is_main:
            self._reporter.finish(summary)
        return summary

    def _next_batches(self) -> list[Batch] | None:
        """Return the micro-batches of the next step; None at every rank if any rank was asked to stop."""
        asked = self._requests.poll()
        batches: list[Batch] | None = None
        failure: Exception | None = None
        try:
            with self._telemetry.measure("data"):
                batches = self._data.next_step()
        except Exception as error:  # the other ranks must not wait, for any error of readers or network
            failure = error
        saver = self._saver
        request, any_failure, writing, overdue = self._control.maximum(
            [float(asked.request), float(failure is not None), float(saver.writing()), float(saver.is_overdue())]
        )
        if any_failure:
            with self._saving():
                self._saver.save_now(self._state, self._position.data_state)
            with self._control.together("cannot read the data", RunError):
                if failure is not None:
                    raise failure
        with self._saving():
            self._saver.poll(self._state.step, any_writing=bool(writing), any_overdue=bool(overdue))
        if request == Request.SAVE:
            self._save_as_asked(self._requests.heed(self._control.gather(asked)))
        return None if request == Request.STOP else batches

    def _save_as_asked(self, reasons: list[str]) -> None:
        for reason in reasons:
            self._log.record("preemption", reason, step=self._state.step)
        with self._saving():
            self._saver.save_now(self._state, self._position.data_state)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Exclude time spent in this block from the step time."""
        with self._pace.excluded(), self._telemetry.measure("save"):
            yield

    def _step(self, micro_batches: list[Batch]) -> None:
        step, logging = self._state.step + 1, self._config.logging
        at_an_end = step in (1, self._config.training.steps)
        with_routing = at_an_end or step % logging.routing_interval == 0
        logged = at_an_end or step % logging.interval == 0
        self._engine.telemetry.record_routing = with_routing
        self._telemetry.before_step(step, logged=logged)
        result = self._position.train(micro_batches)
        seconds = self._pace.step(result.tokens)
        if not self._recovery.check(result):
            return
        self._position.advance_data()
        if with_routing:
            self._log_routing(step)
        if logged:
            self._log_step(result, seconds, [batch.document_length for batch in micro_batches])
        self._telemetry.log_heat_maps(step)
        self._pace.exclude_since_step()
        self._evaluate_if_due()

    def _evaluate_if_due(self) -> None:
        """Compute and show the loss on the held-out sequences after the last step; not counted in the step time."""
        step = self._state.step
        if self._heldout is None or not self._heldout.is_due(step):
            return
        with self._pace.excluded():
            try:
                metrics = self._heldout.evaluate(self._engine, step)
            except RunError:
                self._saver.save_now(self._state, self._position.data_state)
                raise
            if self._curves is not None:
                self._curves.write(step, lambda writer: writer.heldout(metrics))
            self._note(in_words(metrics))

    def _describe(self, writer: MetricsWriter) -> None:
        writer.describe(
            to_yaml(self._config),
            self._config.model_dump(mode="json", exclude={"run", "checkpoint", "logging", "faults", "evaluation"}),
            pages(
                with_mfu=self._peak_flops is not None,
                context_parallel=self._dims.cp_size > 1,
                with_heldout=self._heldout is not None,
                with_routing_warmup=self._config.attention.routing_warmup is not None,
                with_conversion=self._config.attention.conversion is not None,
            ),
        )

    def _continue_curves(self, step: int) -> None:
        """Continue curves and pace from `step`; later steps are undone."""
        self._pace.go_to(step)
        if self._curves is not None:
            self._curves.restart(step)

    def _log_routing(self, step: int) -> None:
        layers = self._engine.telemetry.routing_statistics()
        self._density = {layer.layer: layer.density for layer in layers}
        if self._curves is not None:
            self._curves.write(step, lambda writer: writer.routing(step, layers))

    def _log_step(self, result: StepResult, seconds: float, document_lengths: list[float]) -> None:
        memory = memory_used(self._dims.device)
        parts = self._telemetry.own_seconds()
        of_ranks = self._control.gather((memory, fmean(document_lengths), parts))
        exchange = self._engine.telemetry.exchange_statistics()
        if self._curves is None:
            return
        config, world_size = self._config, self._dims.world_size
        density = sum(self._density.values()) / len(self._density) if self._density else None
        flops = self._engine.flops_per_step(
            result.tokens,
            document_length=fmean(length for _, length, _ in of_ranks),
            density=1.0 if density is None else density,
        )
        flops_per_gpu = flops / (seconds * world_size)
        mean_seconds, max_seconds = over_ranks([parts for *_, parts in of_ranks], seconds)
        metrics = StepMetrics(
            step=self._state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=self._state.tokens,
            step_seconds=seconds,
            tokens_per_second_per_gpu=result.tokens / (seconds * world_size),
            model_tflops_per_gpu=flops_per_gpu / 1e12,
            mfu=None if self._peak_flops is None else flops_per_gpu / self._peak_flops,
            padding=1.0 - result.tokens / self._tokens_per_step,
            skipped_documents=self._data.skipped_documents,
            sources=self._data.progress,
            memory={name: max(used[name] for used, *_ in of_ranks) for name in memory},
            seconds=mean_seconds,
            seconds_max=max_seconds,
            further=result.curves,
        )

        def write(writer: MetricsWriter) -> None:
            writer.step(metrics)
            if exchange is not None:
                writer.exchange(metrics.step, exchange)

        self._curves.write(metrics.step, write)
        self._log.draw(metrics.step)
        self._attempt.reached(metrics.step)
        self._reporter.update(
            StepReport(
                step=self._state.step,
                steps=config.training.steps,
                loss=result.loss,
                tokens_per_second=self._pace.tokens_per_second,
                density=density,
                eta_seconds=self._pace.eta_seconds,
            )
        )

    @property
    def _state(self) -> RunState:
        return self._position.state

    def _note(self, text: str) -> None:
        if self._control.is_main:
            self._reporter.note(text)

    def _summary(self) -> RunSummary:
        padding = 1.0 - self._state.tokens / (self._state.step * self._tokens_per_step) if self._state.step else 0.0
        return RunSummary(
            steps=self._state.step,
            completed=self._state.step >= self._config.training.steps,
            first_loss=self._state.first_loss,
            last_loss=self._state.last_loss,
            tokens=self._state.tokens,
            tokens_per_second=self._pace.tokens_per_second,
            tensorboard_directory=self._tensorboard,
            checkpoint_directory=self._checkpoints.directory,
            density=self._density,
            skipped_documents=self._data.skipped_documents,
            padding=padding,
        )


def _lock_folder(folder: Path, note: Callable[[str], None], cleanup: contextlib.ExitStack) -> None:
    """Create the run's folder and lock it until `cleanup`."""
    folder.mkdir(parents=True, exist_ok=True)
    cleanup.enter_context(RunLock(folder, note))


def _open_data(
    config: RunConfig, dims: Dims, control: ControlGroup, note: Callable[[str], None], beat: Callable[[], None]
) -> tuple[Tokenizer, list[str], DataStream]:
    """The tokenizer, sentences about damaged documents, and this data-parallel rank's stream."""
    sizes = {
        "sequence_length": config.training.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        "dp_rank": dims.dp_rank,
        "dp_size": dims.dp_size,
        "micro_batch_size": config.training.micro_batch_size,
        "chunk_size": config.attention.chunk_size,
    }
    with control.together("the run cannot start", ConfigError):
        tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
        config.model.embedded_tokens(tokenizer.vocab_size)
        check_sizes(config.data, **sizes)  # before the data is prepared, which can take long
    corpus = prepare_together(config.data, tokenizer, control, note=note, beat=beat)
    if config.data.special_tokens:
        before, after = tokenizer.special_tokens
        note(f"data.special_tokens puts {list(before)} before and {list(after)} after each document")
    with control.together("the run cannot start", ConfigError):
        stream = build_data_stream(config.data, tokenizer=tokenizer, corpus=corpus, **sizes)
    return tokenizer, corpus.damage, stream
