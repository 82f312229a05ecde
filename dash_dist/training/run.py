"""One run from its configuration to its summary: the loop, and the order in which its parts are set up.

Knows the parts by what they promise; does not know how its processes were started nor how a step is computed.
"""

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from dash_dist.data import Batch, DataStream, build_data_stream, load_tokenizer, merge_states
from dash_dist.megatron import Engine, ParallelDims, StepResult
from dash_dist.training.checkpoints import CheckpointManager, RunState
from dash_dist.training.config import RunConfig
from dash_dist.training.config_file import to_yaml
from dash_dist.training.control import ControlGroup
from dash_dist.training.errors import CheckpointError, ConfigError, RunError
from dash_dist.training.events import EventLog
from dash_dist.training.metrics import MetricsWriter, StepMetrics, memory_used, peak_bf16_flops
from dash_dist.training.progress import ConsoleProgress, Pace, ProgressReporter, RunStart, RunSummary, StepReport
from dash_dist.training.requests import Request, Requests, RequestsOfRank, nothing_asked
from dash_dist.training.stopping import StopSignal


def train(
    config: RunConfig,
    *,
    reporter: ProgressReporter | None = None,
    requests: Requests = nothing_asked,
) -> RunSummary:
    """Run `config` to its last step, or until it is asked to stop; called in every process of the run.

    The process group may be initialised already; otherwise it is joined as the environment says (RANK,
    WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or the process trains alone.

    Args:
        reporter: told at rank 0 how the run goes; by default this process's console.
        requests: asked between steps at every rank, beside SIGTERM and SIGINT; the largest of all ranks counts.

    Returns:
        The summary, the same at every rank.

    Raises ConfigError for what cannot work on these processes or this machine, CheckpointError, and RunError
    where the data cannot be read or the loss is no longer a number; at every rank, whichever rank found it.
    """
    try:
        dims = ParallelDims.initialise(config.parallel, timeout=config.training.distributed_timeout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    reporter = reporter or ConsoleProgress()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(dims.close)
        cleanup.callback(reporter.close)
        stop = cleanup.enter_context(StopSignal())
        run = _Run(config, dims, reporter, RequestsOfRank(requests, lambda: stop.requested))
        cleanup.callback(run.close)
        return run.to_the_end()


class _Run:
    """The parts of one run at one rank."""

    def __init__(
        self,
        config: RunConfig,
        dims: ParallelDims,
        reporter: ProgressReporter,
        requests: RequestsOfRank,
    ) -> None:
        self._config = config
        self._dims = dims
        self._reporter = reporter
        self._requests = requests
        self._tokens_per_step = config.training.global_batch_size * config.training.sequence_length  # with padding
        self._control = ControlGroup(config.training.distributed_timeout)
        self._checkpoints = CheckpointManager(config.run.path, self._control, keep=config.checkpoint.keep)
        self._events = EventLog(config.run.path)
        self._tensorboard = config.run.path / "tensorboard"
        with self._control.together("the run cannot start", ConfigError):
            config.check_world_size(dims.world_size)
            vocab_size, self._data = _open_data(config, dims)
        origin = self._checkpoints.resume_from(config.run.resume)
        with self._control.together(f"cannot prepare {config.run.path}", RunError):
            if self._control.is_main:
                _write_config(config)
        self._checkpoints.clean()
        with self._control.together("the model cannot be built", ConfigError):
            self._engine = Engine(
                config.model,
                config.attention,
                config.parallel,
                config.optimizer,
                dims=dims,
                vocab_size=vocab_size,
                sequence_length=config.training.sequence_length,
                total_steps=config.training.steps,
                seed=config.run.seed,
            )
        self._state, changes = (RunState(), []) if origin is None else self._load(origin)
        self._saved_step = self._state.step
        self._data_position = self._data.state_dict()
        self._peak_flops = peak_bf16_flops(dims.device)
        self._density: dict[int, float] = {}
        self._skipped_in_a_row = 0
        self._pace = Pace(self._state.step, config.training.steps)
        self._writer: MetricsWriter | None = None
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
            if changes:
                self._reporter.note(f"not the function of the checkpoint: {'; '.join(changes)}")
            self._writer = MetricsWriter(self._tensorboard, start_step=self._state.step)

    def to_the_end(self) -> RunSummary:
        """Train to the last step or the request to stop, and leave a checkpoint of where it ended."""
        if self._state.step >= self._config.training.steps and self._control.is_main:
            self._reporter.note(
                f"run {self._config.run.name} is complete at step {self._state.step}: "
                f"set run.name=... to train anew or training.steps=... to go on"
            )
        while self._state.step < self._config.training.steps:
            micro_batches = self._next_batches()
            if micro_batches is None:
                break
            self._step(micro_batches)
            if self._state.step % self._config.checkpoint.interval == 0:
                self._save()
        if self._state.step > self._saved_step:
            self._save()
        summary = self._summary()
        if self._control.is_main:
            self._reporter.finish(summary)
        return summary

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _next_batches(self) -> list[Batch] | None:
        """The micro-batches of the next step; None at every rank where one of them was asked to stop."""
        asked = self._requests.poll()
        batches: list[Batch] | None = None
        failure: Exception | None = None
        try:
            batches = self._data.next_step()
        except Exception as error:  # whatever the readers and the network raise: the other ranks must not wait
            failure = error
        request, any_failure = self._control.maximum([float(asked.request), float(failure is not None)])
        if any_failure:
            with self._control.together("cannot read the data", RunError):
                if failure is not None:
                    raise failure
        if request == Request.SAVE:
            self._save_as_asked(self._requests.heed(self._control.gather(asked)))
        return None if request == Request.STOP else batches

    def _save_as_asked(self, reasons: list[str]) -> None:
        if self._control.is_main:
            for reason in reasons:
                self._events.append("preemption", reason, step=self._state.step)
                self._reporter.note(f"asked to save: {reason}")
        if self._state.step > self._saved_step:
            self._save()

    def _step(self, micro_batches: list[Batch]) -> None:
        step, logging = self._state.step + 1, self._config.logging
        at_an_end = step in (1, self._config.training.steps)
        with_routing = at_an_end or step % logging.routing_interval == 0
        self._engine.record_routing = with_routing
        result = self._engine.train_step(micro_batches)
        seconds = self._pace.step(result.tokens)
        self._data_position = self._data.state_dict()
        self._state = replace(
            self._state,
            step=step,
            tokens=self._state.tokens + result.tokens,
            first_loss=result.loss if step == 1 else self._state.first_loss,
            last_loss=result.loss,
        )
        self._check_skipped(result)
        if with_routing:
            self._log_routing(step)
        if at_an_end or step % logging.interval == 0:
            self._log_step(result, seconds, [batch.document_length for batch in micro_batches])
        self._pace.leave_out_since_step()

    def _check_skipped(self, result: StepResult) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        numbers = f"loss {result.loss}, gradient norm {result.grad_norm}"
        limit = self._config.training.max_skipped_steps
        if self._skipped_in_a_row > limit:
            raise RunError(
                f"step {self._state.step}: {numbers}; more than training.max_skipped_steps = {limit} such steps "
                f"in a row: lower optimizer.lr or lengthen optimizer.warmup_steps, and start another run (run.name) "
                f"from an earlier checkpoint with run.resume=PATH"
            )
        if result.skipped and self._control.is_main:
            self._reporter.note(f"step {self._state.step} changed no weight: {numbers}")

    def _log_routing(self, step: int) -> None:
        layers = self._engine.routing_statistics()
        self._density = {layer.layer: layer.density for layer in layers}
        if self._writer is not None:
            self._writer.routing(step, layers)

    def _log_step(self, result: StepResult, seconds: float, document_lengths: list[float]) -> None:
        memory = memory_used(self._dims.device)
        of_ranks = self._control.gather((memory, self._own_skipped_documents(), fmean(document_lengths)))
        exchange = self._engine.exchange_statistics()
        if self._writer is None:
            return
        config, world_size = self._config, self._dims.world_size
        density = sum(self._density.values()) / len(self._density) if self._density else None
        mfu = None
        if self._peak_flops is not None:
            flops = self._engine.flops_per_step(
                result.tokens,
                document_length=fmean(length for _, _, length in of_ranks),
                density=1.0 if density is None else density,
            )
            mfu = flops / (seconds * world_size * self._peak_flops)
        self._writer.step(
            StepMetrics(
                step=self._state.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                tokens=self._state.tokens,
                step_seconds=seconds,
                tokens_per_second_per_gpu=result.tokens / (seconds * world_size),
                mfu=mfu,
                padding=1.0 - result.tokens / self._tokens_per_step,
                skipped_documents=sum(skipped for _, skipped, _ in of_ranks),
                memory={name: max(used[name] for used, _, _ in of_ranks) for name in memory},
            )
        )
        if exchange is not None:
            self._writer.exchange(self._state.step, exchange)
        self._writer.flush()
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

    def _save(self) -> None:
        positions = [self._data_position] if self._speaks_for_its_rows else []
        self._checkpoints.save(self._state, self._engine, positions, merge_states)
        self._saved_step = self._state.step
        self._pace.leave_out_since_step()

    @property
    def _speaks_for_its_rows(self) -> bool:
        """One rank of each data-parallel index speaks for the others, which read the same rows."""
        return self._dims.tp_rank == self._dims.cp_rank == self._dims.pp_rank == 0

    def _own_skipped_documents(self) -> int:
        return self._data.skipped_documents if self._speaks_for_its_rows else 0

    def _load(self, origin: Path) -> tuple[RunState, list[str]]:
        state, data_position, changes = self._checkpoints.load(origin, self._engine)
        with self._control.together(f"cannot go on from {origin}", CheckpointError):
            self._data.load_state_dict(data_position)
        own = origin.parent == self._checkpoints.directory
        return state if own else replace(state, origin=str(origin)), changes

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
            skipped_documents=sum(self._control.gather(self._own_skipped_documents())),
            padding=padding,
        )


def _open_data(config: RunConfig, dims: ParallelDims) -> tuple[int, DataStream]:
    """The vocabulary's size and this data-parallel rank's stream."""
    tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
    stream = build_data_stream(
        config.data,
        tokenizer=tokenizer,
        sequence_length=config.training.sequence_length,
        global_batch_size=config.training.global_batch_size,
        dp_rank=dims.dp_rank,
        dp_size=dims.dp_size,
        micro_batch_size=config.training.micro_batch_size,
        chunk_size=config.attention.chunk_size,
    )
    return tokenizer.vocab_size, stream


def _write_config(config: RunConfig) -> None:
    """Save the resolved configuration beside the run."""
    config.run.path.mkdir(parents=True, exist_ok=True)
    partial = config.run.path / ".config.yaml.partial"
    partial.write_text(to_yaml(config), encoding="utf-8")
    os.replace(partial, config.run.path / "config.yaml")
