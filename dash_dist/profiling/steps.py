"""A run's model and documents, and a few of its steps, timed and under PyTorch's profiler.

Knows the order of steps. Does not know what a trace says; reads and writes nothing in the folder of a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch.profiler import ProfilerActivity

from dash_dist.config.evaluation import EvaluationSection
from dash_dist.config.run import Stage
from dash_dist.data.stream import Batch
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.batch import BatchError
from dash_dist.errors import ConfigError, RankError, RunError
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.profiling.parts import modules_with_ranges
from dash_dist.profiling.trace import STEP, STEPS
from dash_dist.training.engines import build_engine
from dash_dist.training.faults.memory import allocated_bytes, out_of_memory, plan_memory
from dash_dist.training.run_data import prepare_data
from dash_dist.training.telemetry.device import memory_used
from dash_kernels.ranges import named_range, ranged

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Timing:
    """Steps without the profiler.

    Attributes:
        seconds: of a step, at the slowest rank.
        tokens: of a global batch, padding excluded.
        memory: name -> GiB, the fullest rank.
    """

    seconds: float
    tokens: float
    memory: dict[str, float]


class Steps:
    """The steps of one stage of a run at one rank, from its initial weights. Every method is a collective.

    Args:
        note: shows a text at the main rank.
        cleanup: leaves the stage's groups.

    Raises:
        ConfigError: the model or its documents cannot be used here.
    """

    def __init__(
        self, stage: Stage, control: ControlGroup, note: Callable[[str], None], cleanup: contextlib.ExitStack
    ) -> None:
        # Held-out documents are not read.
        self._config = config = stage.config.model_copy(update={"evaluation": EvaluationSection()})
        self._control = control
        with control.together("the profile cannot start", ConfigError):
            config.check_world_size(control.size)
            self.dims = ParallelDims.initialise(config.parallel, timeout=config.training.distributed_timeout)
        cleanup.callback(self.dims.close)
        alone = Stage(0, stage.name, stage.first_step, config)
        (prepared,) = prepare_data([alone], control, note=note, beat=lambda: None)
        with control.together("the profile cannot start", ConfigError):
            self._data = prepared.stream(config, self.dims)
        with control.together("the model cannot be built", ConfigError):
            vocab_size = config.model.embedded_tokens(prepared.tokenizer.vocab_size)
            self._engine = build_engine(config, self.dims, vocab_size)
        self._engine.step = stage.first_step
        self._plan = plan_memory(config, self.dims, vocab_size)
        self._kept = allocated_bytes(self.dims.device)
        self._batches: list[Batch] = []

    def timed(self, steps: int) -> Timing:
        """Warm up and time some steps without the profiler."""
        for _ in range(_WARM_UP_STEPS):
            self._step()
        memory_used(self.dims.device)  # forgets the peaks of the first steps
        tokens = 0
        self._wait_for_all()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
            tokens += self._data.step_tokens
        self._synchronize()
        seconds = (time.perf_counter() - start) / steps
        of_ranks = self._control.gather((seconds, memory_used(self.dims.device)))
        memory = {name: max(used[name] for _, used in of_ranks) for name in of_ranks[0][1]}
        return Timing(max(seconds for seconds, _ in of_ranks), tokens / steps, memory)

    def profiled(self, steps: int, trace: Path) -> None:
        """Run some steps under the profiler, and write their trace. Raises RunError if a rank cannot write it."""
        activities = [ProfilerActivity.CPU]
        if self.dims.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with (
            _ranges_of_modules(self._engine.model),
            torch.profiler.profile(activities=activities, record_shapes=True) as profiler,
        ):
            self._step()  # the profiler's own start
            self._wait_for_all()
            with named_range(STEPS):
                for _ in range(steps):
                    with named_range(STEP):
                        self._step()
                self._synchronize()
        with self._control.together(f"cannot write {trace.parent}", RunError):
            profiler.export_chrome_trace(str(trace))

    def density(self) -> float | None:
        """Return the mean density of the layers of kind dash in one more step; None without such layers."""
        self._engine.telemetry.record_routing = True
        self._step()
        layers = self._engine.telemetry.routing_statistics()
        return fmean(layer.density for layer in layers) if layers else None

    def flops(self, tokens: float, density: float | None) -> float:
        """Return the operations of a step on `tokens` tokens, as training counts them for its utilisation."""
        lengths = self._control.gather(fmean(batch.document_length for batch in self._batches))
        assumed = 1.0 if density is None else density
        return self._engine.flops_per_step(round(tokens), document_length=fmean(lengths), density=assumed)

    def _step(self) -> None:
        self._batches = self._next_batches()
        step = self._engine.step
        try:
            self._engine.train_step(self._batches)
        except BatchError as error:
            raise RunError(f"step {step + 1}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise RankError(out_of_memory(self._plan, self.dims.rank, step, error, self._kept)) from error

    def _next_batches(self) -> list[Batch]:
        batches: list[Batch] = []
        failure: Exception | None = None
        try:
            with named_range("data"):
                batches = self._data.next_step()
        except Exception as error:  # the other ranks must not wait, for any error of readers or network
            failure = error
        (any_failure,) = self._control.maximum([float(failure is not None)])
        if any_failure:
            with self._control.together("cannot read the data", RunError):
                if failure is not None:
                    raise failure
        return batches

    def _wait_for_all(self) -> None:
        self._synchronize()
        self._control.maximum([0.0])

    def _synchronize(self) -> None:
        if self.dims.device.type == "cuda":
            torch.cuda.synchronize(self.dims.device)


@contextlib.contextmanager
def _ranges_of_modules(model: torch.nn.Module) -> Iterator[None]:
    """Make the forward passes of a model's modules ranges."""
    named = list(modules_with_ranges(model))
    for module, name in named:
        module.forward = ranged(name)(module.forward)
    try:
        yield
    finally:
        for module, _ in named:
            del module.forward
