"""The command `dash-dist evaluate`: from a run and options to results, a table and a plot.

Knows options, files and the order of groups; does not know what a task asks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dash_dist.checkpoints.folders import step_of
from dash_dist.config.attention import PIECES_PER_RANK
from dash_dist.config.combination import check_combination
from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.config.section import next_multiple
from dash_dist.data.tokenizer import load_tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.distributed.process_group import joined_process_group
from dash_dist.errors import ConfigError, RunError
from dash_dist.evaluation.groups import Bench, Group
from dash_dist.evaluation.loading import (
    CONFIG,
    RunFolder,
    fitting_layout,
    load_as_saved,
    load_predictor,
    load_stage,
    read_state,
    verify,
)
from dash_dist.evaluation.options import Options
from dash_dist.evaluation.results import ResultFile
from dash_dist.evaluation.samples import make_sample
from dash_dist.evaluation.suites import SUITES
from dash_dist.evaluation.table import table_of
from dash_dist.megatron.parallel import ParallelDims


def evaluate(run: Path, overrides: Sequence[str], options: Options, console: Console) -> list[Group]:
    """Evaluate a checkpoint of the run in `run`, and return all groups. Every process calls it.

    Rank 0 writes to the console, to the results after each group, and the plot.

    Raises:
        ConfigError: the options, the configuration or the lengths cannot be.
        CheckpointError: the checkpoint cannot be found or loaded.
        RunError: the results cannot be written.
    """
    folder = RunFolder.of(run, step=options.step)
    timeout = load_config(folder.path / CONFIG).training.distributed_timeout
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(joined_process_group(timeout=timeout))
        control = ControlGroup(timeout)
        # The main rank chooses: storage may look different to others, and a run may still be writing.
        folder = control.on_main("the evaluation cannot start", ConfigError, folder.with_checkpoint)
        with control.together("the evaluation cannot start", ConfigError):
            config, remark = fitting_layout(load_stage(folder.path / CONFIG, folder.step, overrides), overrides)
            dims = ParallelDims.initialise(config.parallel, timeout=timeout)
        cleanup.callback(dims.close)
        note = functools.partial(_print, console) if control.is_main else _say_nothing
        if remark is not None:
            note(remark)
        return _Evaluation(folder, config, overrides, options, dims, control, note).all_groups()


class _Evaluation:
    """The groups of one command, at one rank. Every method is a collective."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        overrides: Sequence[str],
        options: Options,
        dims: ParallelDims,
        control: ControlGroup,
        note: Callable[[Any], None],
    ) -> None:
        self._folder, self._options, self._dims, self._control, self._note = folder, options, dims, control, note
        cannot = "the evaluation cannot start"
        self._checkpoint, saved_at = control.on_main(cannot, ConfigError, folder.find_checkpoint)
        state = control.on_main(cannot, ConfigError, lambda: read_state(self._checkpoint))
        with control.together(cannot, ConfigError):
            saved = load_as_saved(folder.path / CONFIG, state, overrides)
            self._config = saved.model_copy(
                update={
                    "parallel": config.parallel,
                    "attention": saved.attention.model_copy(update={"ranks_per_node": config.attention.ranks_per_node}),
                }
            )
            data = self._config.data
            self._tokenizer = load_tokenizer(data.tokenizer, end_of_document=data.end_of_document)
            self._vocab_size = self._config.model.embedded_tokens(self._tokenizer.vocab_size)
            self._lengths = options.tokens or (state.sequence_length,)
            self._start = self._tokenizer.special_tokens[0] if data.special_tokens else ()
            self._check_lengths()
            self._scales = self._routing_scales()
        beyond = [length for length in self._lengths if length > state.sequence_length]
        if beyond:
            note(f"{max(beyond)} tokens are beyond the {state.sequence_length} that the model was trained on")
        self._file = ResultFile(self._output, self._settings(saved_at), self._circumstances())

    def all_groups(self) -> list[Group]:
        """Evaluate the groups that the file of results lacks, and show all of them."""
        control, options = self._control, self._options
        groups = control.on_main("the results cannot be completed", ConfigError, self._file.read)
        known = {(group.task, group.length, group.routing_scale) for group in groups}
        asked = [
            (length, scale, task)
            for length in self._lengths
            for scale in self._scales
            for task in SUITES[options.suite]
        ]
        missing = [(length, scale, task) for length, scale, task in asked if (task, length, scale) not in known]
        if len(missing) < len(asked):
            self._note(f"{len(asked) - len(missing)} of {len(asked)} groups are in {self._output} already")
        if missing:
            groups += self._evaluate(missing, groups)
        order = {(task, length, scale): place for place, (length, scale, task) in enumerate(asked)}
        shown = [group for group in groups if (group.task, group.length, group.routing_scale) in order]
        shown.sort(key=lambda group: order[group.task, group.length, group.routing_scale])
        self._note(table_of(shown))
        control.on_main("the plot cannot be written", RunError, lambda: self._plot(shown))
        return shown

    def _evaluate(self, missing: Sequence[tuple[int, float | None, str]], before: Sequence[Group]) -> list[Group]:
        config, options = self._config, self._options
        verify(self._checkpoint, self._control)
        predictor, changes = load_predictor(
            config,
            self._checkpoint,
            self._dims,
            self._control,
            vocab_size=self._vocab_size,
            sequence_length=self._padded(missing[0][0]),
        )
        if changes:
            self._note(f"not the function of the checkpoint: {'; '.join(changes)}")
        self._note(f"{self._checkpoint} on {self._dims.describe()}")
        bench = Bench(
            predictor,
            self._tokenizer,
            self._control,
            batch=self._dims.dp_size * self._dims.pp_size,
            start=self._start,
            seed=options.seed,
        )
        groups: list[Group] = []
        for length, scale, task in missing:
            padded = self._padded(length)
            predictor.set_sequence_length(padded)
            if scale is not None:
                predictor.set_routing_scale(scale)
            group = bench.group(
                task, length=length, sequence_length=padded, samples=options.samples, routing_scale=scale
            )
            groups.append(group)
            self._control.on_main(
                f"{self._output} cannot be written", RunError, lambda: self._file.write([*before, *groups])
            )
            scaled = "" if scale is None else f", routing scale {scale:g}"
            self._note(
                f"{task} at {length} tokens{scaled}: accuracy {group.accuracy:.2f}, density {group.density:.3f}, "
                f"{group.seconds:.0f} s"
            )
        return groups

    def _check_lengths(self) -> None:
        """Refuse, with ValueError, lengths that the model cannot take, or that a task cannot fill."""
        config = self._config
        for length in self._lengths:
            check_combination(
                config.model,
                config.attention,
                config.parallel,
                world_size=self._dims.world_size,
                sequence_length=self._padded(length),
            )
            for task in SUITES[self._options.suite]:
                make_sample(task, self._tokenizer, length=length, index=0, seed=self._options.seed, start=self._start)

    def _padded(self, length: int) -> int:
        """Tokens of the sequences that hold samples of `length` tokens."""
        attention, parallel = self._config.attention, self._config.parallel
        pieces = PIECES_PER_RANK[attention.layout] * parallel.context * attention.chunk_size
        return next_multiple(
            length, math.lcm(pieces if parallel.context > 1 else 1, parallel.context * parallel.sequence_shards)
        )

    def _routing_scales(self) -> tuple[float | None, ...]:
        attention, asked = self._config.attention, self._options.routing_scales
        if "dash" not in attention.pattern:
            if asked:
                raise ConfigError(
                    f"--routing-scale {' '.join(f'{scale:g}' for scale in asked)}: the run has attention.kind "
                    f"{' '.join(attention.pattern)}, which routes nothing; drop the option"
                )
            return (None,)
        return asked or (attention.routing_scale,)

    @property
    def _output(self) -> Path:
        if self._options.output is not None:
            return self._options.output
        step = step_of(self._checkpoint)
        return self._folder.path / "evaluation" / f"{self._options.suite}-{step:08d}.json"

    def _plot(self, groups: Sequence[Group]) -> None:
        path = self._options.plot
        if path is None and importlib.util.find_spec("matplotlib") is not None:
            path = self._output.with_suffix(".png")
        if path is not None:
            from dash_dist.evaluation.plot import plot

            path.parent.mkdir(parents=True, exist_ok=True)
            plot(path, groups)
            self._note(f"wrote {self._output} and {path}")

    def _settings(self, saved_at: float) -> dict[str, Any]:
        attention = self._config.attention
        return {
            "checkpoint": self._checkpoint.name,
            "saved_at": saved_at,
            "seed": self._options.seed,
            "samples": self._options.samples,
            "tokenizer": self._tokenizer.fingerprint,
            "special_tokens": self._config.data.special_tokens,
            "model": self._config.model.model_dump(mode="json", exclude={"weights", "init_std"}),
            "attention": {
                "kind": list(attention.pattern),
                **{name: getattr(attention, name) for name in ("window", "chunk_size", "alpha", "prior_sigma")},
                **attention.model_dump(mode="json", include={"top_chunks", "infllmv2", "nsa"}, exclude_none=True),
                **({"attend_first_chunk": True} if attention.attend_first_chunk else {}),
            },
        }

    def _circumstances(self) -> dict[str, Any]:
        device = self._dims.device
        return {
            "suite": self._options.suite,
            "run": str(self._folder.path),
            "layout": self._dims.describe(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": {name: _version(name) for name in ("dash-dist", "torch", "megatron-core")},
        }


def _print(console: Console, what: Any) -> None:
    console.print(what, soft_wrap=isinstance(what, str))


def _say_nothing(_: Any) -> None:
    pass


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source
        return "unknown"
