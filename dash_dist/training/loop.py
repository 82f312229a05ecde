"""The training loop of one stage of a run.

Knows the interfaces of its parts and the order of a step; does not know how its processes were started, what other
stages there are, or how a step is computed.
"""

import contextlib
from collections.abc import Iterator
from statistics import fmean

import torch

from dash_dist.config.file import to_yaml
from dash_dist.config.run import Stage
from dash_dist.data.stream import Batch
from dash_dist.engine.protocol import StepResult
from dash_dist.errors import ConfigError, RankError, RunError
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.models.start import advise_conversion
from dash_dist.run.curve_names import pages
from dash_dist.run.messages import RunStart, RunSummary, StepReport
from dash_dist.run.requests import Request
from dash_dist.run.state import RunState
from dash_dist.training.engines import build_engine
from dash_dist.training.faults.memory import allocated_bytes, out_of_memory, plan_memory
from dash_dist.training.faults.recovery import LossRecovery
from dash_dist.training.pace import Pace
from dash_dist.training.position import Changes, RunPosition
from dash_dist.training.saving import Saver
from dash_dist.training.session import Session
from dash_dist.training.stage_evaluation import StageEvaluation
from dash_dist.training.telemetry.curves import Curves
from dash_dist.training.telemetry.device import memory_used, peak_bf16_flops, wait_for_device
from dash_dist.training.telemetry.metrics import HeldOutMetrics, MetricsWriter, StepMetrics
from dash_dist.training.telemetry.recorder import Telemetry, over_ranks

_NO_HYPERPARAMETERS = {"run", "checkpoint", "logging", "faults", "evaluation", "stages"}


class TrainingLoop:
    """The steps of one stage at one rank.

    Args:
        dims: of the stage's layout.
        cleanup: closes the parts.

    Attributes:
        stopped: the run was asked to stop before the end of the stage.
    """

    def __init__(self, session: Session, stage: Stage, dims: ParallelDims, cleanup: contextlib.ExitStack) -> None:
        self.stopped = False
        self._session = session
        self._stage = stage
        config = self._config = stage.config
        self._dims = dims
        self._control = session.control
        self._checkpoints = session.checkpoints
        self._log = session.log
        self._tensorboard = config.run.path / "tensorboard"
        origin = session.origin
        prepared = session.data[stage.number]
        with self._control.together("the run cannot start", ConfigError):
            self._data = prepared.stream(config, dims)
        if (advice := prepared.advice(config)) is not None:
            session.note(advice)
        self._evaluation = StageEvaluation(session, stage, prepared, dims, show=self._show_heldout)
        with self._control.together("the model cannot be built", ConfigError):
            vocab_size = config.model.embedded_tokens(prepared.tokenizer.vocab_size)
            self._memory = plan_memory(config, dims, vocab_size)
            if self._memory is not None and (warning := self._memory.warning()) is not None:
                session.note(warning)  # now, before moments take their part of the host's memory
            self._engine = build_engine(config, dims, vocab_size, resumed=origin is not None)
            if origin is None and (advice := advise_conversion(config.model, config.attention)) is not None:
                session.note(advice)
        session.watchdog.beat()
        self._position = RunPosition(self._engine, self._data, self._control, stage)
        changes = Changes() if origin is None else self._position.load(self._checkpoints, origin)
        session.watchdog.beat()
        self._saver = Saver(
            self._checkpoints,
            self._engine,
            self._log,
            session.watchdog.beat,
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
            beat=session.watchdog.beat,
            undone=self._continue_curves,
        )
        self._kept_bytes = allocated_bytes(dims.device)
        self._is_new = origin is None
        self._peak_flops = peak_bf16_flops(dims.device)
        self._density: dict[int, float] = {}
        self._pace = Pace(self._state.step, config.training.steps)
        self._curves: Curves | None = None
        if self._control.is_main:
            self._begin_curves(cleanup)
        self._record(changes)
        if self._engine.optimizer_changes:
            self._log.record("trainable_changed", "; ".join(self._engine.optimizer_changes), step=self._state.step)
        if origin is None or changes.data:
            for told in prepared.corpus.damage:
                self._log.record("data_damaged", told, step=self._state.step)
        self._telemetry = Telemetry(config, self._engine.telemetry, self._curves)

    def _begin_curves(self, cleanup: contextlib.ExitStack) -> None:
        session, stage = self._session, self._stage
        session.reporter.start(
            RunStart(
                name=f"{self._config.run.name}, stage {stage.name}" if stage.name else self._config.run.name,
                layout=self._dims.describe(),
                start_step=self._state.step,
                steps=self._config.training.steps,
                tokens_per_step=self._config.training.tokens_per_step,
                resumed_from=session.origin,
            )
        )
        for stepped_over in self._checkpoints.stepped_over:
            session.reporter.note(stepped_over)
        self._curves = self._log.curves = Curves(
            self._tensorboard,
            start_step=self._state.step,
            describe=self._describe,
            on_failure=lambda reason: self._log.record("metrics_failed", reason, step=self._state.step),
        )
        cleanup.callback(self._end_curves, self._curves)
        self._log.draw(self._state.step)

    def _end_curves(self, curves: Curves) -> None:
        curves.close()
        self._log.curves = None  # the log goes on, without this loop

    def _change_of_conversion(self) -> list[str]:
        if self._stage.number == 0:
            return []
        before = self._session.config.stage_list[self._stage.number - 1].config.attention.conversion
        now = self._config.attention.conversion
        return [] if before == now else [f"attention.conversion was {before} and is {now}"]

    def _record(self, changes: Changes) -> None:
        """Tell how the run differs from the checkpoint that it continues from."""
        step = self._state.step
        if changes.new_stage:
            described = [*changes.function, *self._change_of_conversion(), *changes.data]
            what = f"stage {self._stage.name} begins: {'; '.join(described) or 'the same function and documents'}"
            self._log.record("stage", what, step=step)
            return
        if changes.function:
            self._session.note(f"not the function of the checkpoint: {'; '.join(changes.function)}")
        if changes.schedule is not None and step < self._config.training.steps:
            self._log.record("schedule_changed", changes.schedule, step=step)
        for change in changes.data:
            self._log.record("data_changed", change, step=step)

    def to_the_end(self) -> RunSummary:
        """Train to the last step of the stage or to a request to stop, and save a checkpoint there.

        A rollback to an earlier stage ends the loop, too.

        Raises:
            RankError: at one rank alone, whose device has no more memory.
        """
        try:
            return self._train_to_the_end()
        except torch.OutOfMemoryError as error:
            kept, step = self._kept_bytes, self._state.step
            raise RankError(out_of_memory(self._memory, self._dims.rank, step, error, kept)) from error

    def _train_to_the_end(self) -> RunSummary:
        first, steps, session = self._stage.first_step, self._config.training.steps, self._session
        if self._state.step >= session.config.training.steps:
            self._log.note(
                f"run {self._config.run.name} is complete at step {self._state.step}: "
                f"set run.name=... to train anew or training.steps=... to go on"
            )
        if self._is_new and self._config.faults.spike_z_score is not None:
            # A spike may come before the first regular checkpoint.
            with self._saving():
                self._saver.start(self._state, self._position.data_state)
                self._saver.settle(self._state.step)
        prepared = False
        while first <= self._state.step < steps:
            session.watchdog.beat()
            micro_batches = self._next_batches()
            if micro_batches is None:
                self.stopped = True
                break
            if self._recovery.should_skip(self._state.step + 1):
                self._position.skip_batch()
                self._pace.go_to(self._state.step)
                self._evaluate_if_due()
            else:
                self._step(micro_batches)
                if not prepared:  # what a step keeps in host memory is there now
                    self._checkpoints.prepare(self._engine)
                    prepared = True
            if self._saver.is_due(self._state):
                with self._saving():
                    self._saver.start(self._state, self._position.data_state)
        self._saver.save_at_the_end(self._state, self._position.data_state)
        if self._state.step >= steps:
            self._evaluation.check_gate(self._engine, self._state.step)
        summary = self._summary()
        if self._curves is not None and summary.completed:
            self._curves.write(self._state.step, lambda writer: writer.finished())
        return summary

    def _next_batches(self) -> list[Batch] | None:
        """Return the micro-batches of the next step; None at every rank if any rank was asked to stop."""
        asked = self._session.requests.poll()
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
            self._save_as_asked(self._session.requests.heed(self._control.gather(asked)))
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
        logged, next_logged = (self._telemetry.is_due(logging.interval, one) for one in (step, step + 1))
        with_routing = self._telemetry.is_due(logging.routing_interval, step)
        self._engine.telemetry.record_routing = with_routing
        self._telemetry.before_step(step, logged=logged)
        result = self._position.train(micro_batches)
        if logged or next_logged:
            # The device still updates the weights: in a logged step that counts, and in the one before not in the next.
            wait_for_device(self._dims.device)
        seconds = self._pace.step(self._data.step_tokens)
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
        """Compute the loss on the held-out sequences after the last step; not counted in the step time."""
        if not self._evaluation.is_due(self._state.step):
            return
        with self._pace.excluded():
            try:
                self._evaluation.evaluate(self._engine, self._state.step)
            except RunError:
                self._saver.save_now(self._state, self._position.data_state)
                raise

    def _show_heldout(self, metrics: HeldOutMetrics) -> None:
        if self._curves is not None:
            self._curves.write(metrics.step, lambda writer: writer.heldout(metrics))

    def _describe(self, writer: MetricsWriter) -> None:
        writer.describe(
            to_yaml(self._session.config),
            self._config.model_dump(
                mode="json", exclude={"run", "checkpoint", "logging", "faults", "evaluation", "stages"}
            ),
            pages(
                with_mfu=self._peak_flops is not None,
                context_parallel=self._dims.cp_size > 1,
                with_heldout=self._evaluation.with_heldout,
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
        tokens = self._data.step_tokens
        flops = self._engine.flops_per_step(
            tokens,
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
            tokens_per_second_per_gpu=tokens / (seconds * world_size),
            model_tflops_per_gpu=flops_per_gpu / 1e12,
            mfu=None if self._peak_flops is None else flops_per_gpu / self._peak_flops,
            padding=1.0 - tokens / self._config.training.tokens_per_step,
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
        self._session.attempt.reached(metrics.step)
        self._session.reporter.update(
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

    def _summary(self) -> RunSummary:
        computed = self._session.config.tokens_of_steps(self._state.step)
        return RunSummary(
            steps=self._state.step,
            completed=self._state.step >= self._session.config.training.steps,
            first_loss=self._state.first_loss,
            last_loss=self._state.last_loss,
            tokens=self._state.tokens,
            tokens_per_second=self._pace.tokens_per_second,
            tensorboard_directory=self._tensorboard,
            checkpoint_directory=self._checkpoints.directory,
            density=self._density,
            skipped_documents=self._data.skipped_documents,
            padding=1.0 - self._state.tokens / computed if computed else 0.0,
        )
