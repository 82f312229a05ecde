"""`dash-dist profile`: from a run's configuration to a table, a trace of every rank and `profile.json`.

Knows options, files and the order of the parts. Does not know how a step is measured.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig, Stage
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.distributed.first_failure import FirstFailure
from dash_dist.distributed.process_group import joined_process_group
from dash_dist.errors import ConfigError, RunError
from dash_dist.planning.hardware import GPUS
from dash_dist.profiling.anatomy import Anatomy, Peaks, anatomy_of, over_ranks
from dash_dist.profiling.parts import OTHER
from dash_dist.profiling.steps import Steps, Timing
from dash_dist.profiling.table import table_of
from dash_dist.profiling.trace import read_trace
from dash_dist.run.profile import FILE, FOLDER, PartTime, Profile, facts_of
from dash_dist.training.faults.watchdog import Watchdog
from dash_dist.training.telemetry.device import peak_bf16_flops

_TRACES = "trace_rank_*.json.gz"


@dataclass(frozen=True)
class Options:
    """Options of the command.

    Attributes:
        steps: under the profiler, and as many without it.
        out: folder of the files; None for `profile/` in the folder of the run.
        stage: name of the stage; None for the first one.
    """

    steps: int = 5
    out: Path | None = None
    stage: str | None = None


def profile(path: Path, overrides: Sequence[str], options: Options, console: Console) -> Profile:
    """Profile some steps of a run from its initial weights, and return their profile. Every process calls it.

    Rank 0 writes to the console. Nothing of a run is read or written but `profile/` in its folder, and the cache of its
    documents.

    Raises:
        ConfigError: the configuration, or the stage, cannot be, or not on these processes or this machine.
        RunError: the data cannot be read, or the files cannot be written.
        RankError: at one rank alone, whose device has no more memory. Every other rank is ended soon.
    """
    config = load_config(path, overrides)
    stage = _stage(config, options.stage)
    out = options.out or config.run.path / FOLDER
    with contextlib.ExitStack() as cleanup:
        watchdog = cleanup.enter_context(Watchdog(None))
        timeout = stage.config.training.distributed_timeout
        cleanup.enter_context(joined_process_group(timeout=timeout))
        cleanup.enter_context(FirstFailure(ending=watchdog.end_soon))
        control = ControlGroup(timeout)

        def note(text: str) -> None:
            if control.is_main:
                console.print(text, soft_wrap=True, markup=False)

        with control.together(f"cannot write {out}", RunError):
            _try_to_write(out)
        steps = Steps(stage, control, note, cleanup)
        note(f"{config.run.name} on {steps.dims.describe()}: {options.steps} steps")
        found = _measure(config.run.name, stage, steps, control, options.steps, out)
        control.on_main(f"cannot write {out}", RunError, lambda: found.write(out))
        _show(found, out, note)
        return found


def _measure(name: str, stage: Stage, steps: Steps, control: ControlGroup, count: int, out: Path) -> Profile:
    """Return the profile, the same at every rank."""
    timing = steps.timed(count)
    control.on_main(f"cannot write {out}", RunError, lambda: _remove_traces(out))
    trace = out / _TRACES.replace("*", f"{control.rank:05d}")
    steps.profiled(count, trace)
    density = steps.density()
    flops = steps.flops(timing.tokens, density)
    with control.together("the trace cannot be read", RunError):
        anatomy = anatomy_of(read_trace(trace))
    of_ranks = control.gather((anatomy, trace.name))
    device = steps.dims.device
    peaks = Peaks(peak_bf16_flops(device), _bandwidth(device))
    return _profile(
        name,
        stage.name,
        steps.dims.describe(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        timing,
        density,
        flops,
        [anatomy for anatomy, _ in of_ranks],
        peaks,
        [file for _, file in of_ranks],
    )


def _profile(
    name: str,
    stage: str,
    layout: str,
    device: str,
    timing: Timing,
    density: float | None,
    flops: float,
    anatomies: Sequence[Anatomy],
    peaks: Peaks,
    traces: Sequence[str],
) -> Profile:
    ranks, steps = len(anatomies), anatomies[0].steps
    seconds = timing.seconds * ranks
    gaps = [anatomy.gap / steps * 1e-6 for anatomy in anatomies]
    return Profile(
        run=name,
        stage=stage,
        layout=layout,
        device=device,
        ranks=ranks,
        steps=steps,
        step_seconds=timing.seconds,
        profiled_seconds=sum(anatomy.window for anatomy in anatomies) / ranks / steps * 1e-6,
        gap_seconds=sum(gaps) / ranks,
        gap_seconds_max=max(gaps),
        tokens_per_second_per_gpu=timing.tokens / seconds,
        model_tflops_per_gpu=flops / seconds / 1e12,
        mfu=None if peaks.flops is None else flops / seconds / peaks.flops,
        density=density,
        memory=timing.memory,
        parts=over_ranks(anatomies, peaks),
        traces=traces,
    )


def _show(found: Profile, out: Path, note: Callable[[str], None]) -> None:
    note(table_of(found))
    for part in found.parts:
        if part.part == OTHER:
            note(f"{part.title}: {_names(part)}")
    note("; ".join(f"{title} {text}" for title, text in facts_of(found).items()))
    note(f"wrote {out / FILE} and {len(found.traces)} trace{'s' if len(found.traces) > 1 else ''} beside it")


def _names(part: PartTime) -> str:
    return ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in part.names.items())


def _stage(config: RunConfig, name: str | None) -> Stage:
    """Return the stage of a name. Raises ConfigError."""
    stages = config.stage_list
    if name is None:
        return stages[0]
    known = [stage.name for stage in stages if stage.name]
    if name not in known:
        advice = f"give one of {', '.join(known)}" if known else "the run has no stages; drop the option"
        raise ConfigError(f"--stage {name}: {advice}")
    return stages[known.index(name)]


def _try_to_write(folder: Path) -> None:
    """Create a folder and a file in it that has no name. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _remove_traces(folder: Path) -> None:
    """Remove those of an earlier profile, which may have had more ranks."""
    for trace in folder.glob(_TRACES):
        trace.unlink()


def _bandwidth(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.bandwidth for part, gpu in GPUS.items() if part in name), None)
