"""The weights, moments and step of `engine: deepspeed` in files that any number of ranks and any ZeRO stage can load.

    rank_00000.safetensors   the slices that this rank owned: "weight/NAME", "exp_avg/NAME" and "exp_avg_sq/NAME", flat;
                             a frozen parameter has no "exp_avg" and "exp_avg_sq"
    deepspeed.json           step, settings, the shape of every parameter, and who wrote which slice; written last

Knows one checkpoint directory. Does not know which of a run's checkpoints to keep or to load. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dash_dist.checkpoints.engine_state import LORA
from dash_dist.checkpoints.folders import sync
from dash_dist.checkpoints.integrity import FileChecksum, checksum_of
from dash_dist.config.trainable import ADAPTERS
from dash_dist.deepspeed_engine.slices import WEIGHT, OwnedSlice, needed_slices, owned_slices, parameter_shapes
from dash_dist.deepspeed_engine.zero import ZeroOptimizer
from dash_dist.distributed.agreement import Agreement
from dash_dist.megatron.checkpoint import EngineState, check_fit, create_directory
from dash_dist.megatron.host_copies import HostCopies
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.run.files import replace_text

INDEX = "deepspeed.json"
_FORMAT = 2
_OF_MEGATRON = "metadata.json"


class ZeroSave:
    """A checkpoint that a thread writes, at one rank: a `PendingSave`."""

    def __init__(
        self,
        directory: Path,
        slices: Sequence[OwnedSlice],
        index: dict[str, Any],
        dims: ParallelDims,
        copies: HostCopies | None,
    ) -> None:
        self._directory, self._index, self._dims = directory, index, dims
        self._checksums: dict[str, FileChecksum] = {}
        self._problem: OSError | None = None
        self._is_abandoned = False
        tensors = _tensors_of(slices)
        if copies is not None:  # the optimizer continues while they are written
            tensors = dict(zip(tensors, copies.copy(list(tensors.values())), strict=True))
        # A daemon: a run that ends by an error does not wait for a checkpoint that cannot be completed.
        self._writer = threading.Thread(target=self._write, args=(tensors,), name="checkpoint", daemon=True)
        self._writer.start()
        if copies is None:
            self._writer.join()

    def done(self) -> bool:
        """Return whether this rank's file is written, so that `finish` would not wait for it. Local."""
        return not self._writer.is_alive()

    def finish(self) -> dict[str, FileChecksum]:
        """Wait for all files and complete the checkpoint. A collective: all ranks call it.

        Returns:
            Size and CRC-32 of the file that this rank wrote.

        Raises:
            OSError: at every rank: some rank could not write.
        """
        self._writer.join()
        agreement = Agreement()
        agreement.raise_first(self._problem)
        agreement.call_on_main(self._write_index)
        return self._checksums

    def abandon(self) -> None:
        """Leave the checkpoint incomplete. Local.

        What this rank is writing may still be written to its end; without the index, which only `finish` writes, it is
        no checkpoint. A file that is not begun stays so.
        """
        self._is_abandoned = True

    def _write_index(self) -> None:
        path = self._directory / INDEX
        try:
            replace_text(path, json.dumps(self._index))
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}") from None

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._is_abandoned:
            return
        path = self._directory / _file_of(self._dims.rank)
        try:
            save_file(tensors, path)
            sync(path)
            self._checksums[path.name] = checksum_of(path)
        except Exception as error:  # whatever it is: `finish` must not complete a checkpoint without this file
            self._problem = OSError(f"cannot write {path}: {error}")


def start_save(
    directory: Path,
    model: nn.Module,
    optimizer: ZeroOptimizer,
    dims: ParallelDims,
    run: EngineState,
    *,
    copies: HostCopies | None,
) -> ZeroSave:
    """Copy this rank's slices and begin to write them. A collective: all ranks call it.

    Args:
        directory: on storage that all ranks share; created, and must be empty.
        run: rank 0's is kept.
        copies: memory for the copies, in use until the result has finished; None: this rank has written when this
            returns.

    Raises:
        OSError: at every rank: the directory cannot be created, or is not empty.
        RankError: this rank's host has too little memory for the copies.
    """
    agreement = Agreement()
    agreement.call_on_main(lambda: create_directory(directory))
    slices = owned_slices(model, optimizer)
    places = agreement.gather([(one.parameter, one.start, len(one)) for one in slices])
    index = {
        "format": _FORMAT,
        "engine": "deepspeed",
        "zero_stage": optimizer.stage,
        "run": asdict(run),
        "updates": optimizer.updates,
        "shapes": parameter_shapes(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "slices": {_file_of(rank): of_rank for rank, of_rank in enumerate(places)},
    }
    return ZeroSave(directory, slices, index, dims, copies)


def prepare_save(model: nn.Module, optimizer: ZeroOptimizer, copies: HostCopies) -> None:
    """Begin to allocate what `start_save` copies to; returns at once. Local."""
    copies.prepare(list(_tensors_of(owned_slices(model, optimizer)).values()))


def _tensors_of(slices: Sequence[OwnedSlice]) -> dict[str, torch.Tensor]:
    """Return the tensors of this rank's file by name."""
    return {f"{key}/{one.parameter}": tensor for one in slices for key, tensor in one.tensors.items()}


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: ZeroOptimizer, dims: ParallelDims, identity: dict[str, Any]
) -> tuple[EngineState, int]:
    """Load weights and optimizer state in place. A collective: all ranks call it.

    The checkpoint may come from other data- and context-parallel sizes, and another ZeRO stage. Parameters that were
    frozen in it start with a new optimizer state.

    Returns:
        The state that is not a tensor, and the number of parameters with a new optimizer state.

    Raises:
        FileNotFoundError: at every rank: there is no complete checkpoint in the directory.
        ValueError: at every rank: the checkpoint is of another engine or model; or a file cannot be read, and what the
            weights are then is undefined. Names what.
    """
    agreement = Agreement()
    index = agreement.call_on_main(lambda: _read_index(directory, identity, parameter_shapes(model)))
    problem: ValueError | None = None
    try:
        _read_slices(directory, index["slices"], index["frozen"], needed_slices(model, optimizer))
    except ValueError as error:
        problem = error
    agreement.raise_first(problem)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    fresh = sum(name in index["frozen"] or name not in index["shapes"] for name in trained)
    optimizer.updates = index["updates"] if fresh < len(trained) else 0
    optimizer.share_weights()
    return EngineState(**index["run"]), fresh


def load_weights(directory: Path, model: nn.Module, dims: ParallelDims, identity: dict[str, Any]) -> EngineState:
    """Load the weights alone into a model that no engine trains, in place. A collective: all ranks call it.

    Raises:
        FileNotFoundError, ValueError: at every rank: see `load_checkpoint`.
    """
    agreement = Agreement()
    index = agreement.call_on_main(lambda: _read_index(directory, identity, parameter_shapes(model)))
    slices = [OwnedSlice(name, 0, {WEIGHT: one.data.view(-1)}) for name, one in model.named_parameters()]
    problem: ValueError | None = None
    try:
        _read_slices(directory, index["slices"], index["frozen"], slices)
    except ValueError as error:
        problem = error
    agreement.raise_first(problem)
    return EngineState(**index["run"])


def _read_index(directory: Path, identity: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    if (directory / _OF_MEGATRON).is_file():
        raise ValueError(
            f"{directory} was written by engine: megatron and this run has engine: deepspeed, which cannot load it: "
            "set engine to megatron"
        )
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{directory} has no {INDEX}: it is not a checkpoint, or not written to its end"
        ) from None
    try:
        if index["format"] != _FORMAT:
            raise ValueError(f"{directory / INDEX} has format {index['format']}, and this version reads {_FORMAT}")
        saved = EngineState(**index["run"])
        saved.identity.update(_shapes_as_settings(index["shapes"]))
        shapes = {name: shape for name, shape in shapes.items() if ADAPTERS not in name or LORA in saved.identity}
        check_fit(directory, saved, identity | _shapes_as_settings(shapes))
        _check_coverage(index["slices"], index["shapes"], directory)
        if unknown := set(index["frozen"]) - index["shapes"].keys():
            raise ValueError(f"{directory / INDEX} is damaged: it has frozen parameters without a shape, {unknown}")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / INDEX} is damaged or of another program: {error!r}") from error
    return index


def _shapes_as_settings(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"the shape of {name}": shape for name, shape in shapes.items()}


def _check_coverage(files: dict[str, list[Any]], shapes: dict[str, list[int]], directory: Path) -> None:
    """Refuse an index whose slices do not make up every parameter."""
    ends = dict.fromkeys(shapes, 0)
    for name, start, size in sorted(tuple(place) for places in files.values() for place in places):
        if ends.get(name) != start:
            raise ValueError(f"{directory / INDEX} is damaged: the slices of {name} do not follow each other")
        ends[name] = start + size
    for name, shape in shapes.items():
        if ends[name] != math.prod(shape):
            raise ValueError(
                f"{directory / INDEX} is damaged: the slices of {name} are not {math.prod(shape)} elements"
            )


def _read_slices(
    directory: Path, files: dict[str, list[Any]], frozen: Collection[str], slices: Sequence[OwnedSlice]
) -> None:
    """Fill this rank's slices from wherever their elements are; only those are read.

    Args:
        frozen: parameters without moments in the files; those are zero then.
    """
    by_parameter: dict[str, list[tuple[int, int, str]]] = {}
    for file, places in files.items():
        for name, start, size in places:
            by_parameter.setdefault(name, []).append((start, size, file))
    with ExitStack() as open_files, torch.no_grad():
        readers: dict[str, Any] = {}
        for one in slices:
            for start, end, file, offset in _overlaps(one, by_parameter.get(one.parameter, ())):  # a new adapter: none
                try:
                    if file not in readers:
                        readers[file] = open_files.enter_context(safe_open(directory / file, framework="pt"))
                    for key, tensor in one.tensors.items():
                        if key != WEIGHT and one.parameter in frozen:
                            tensor.zero_()
                            continue
                        stored = readers[file].get_slice(f"{key}/{one.parameter}")
                        tensor[start - one.start : end - one.start].copy_(stored[start - offset : end - offset])
                except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: fewer elements than listed
                    raise ValueError(f"cannot read {directory / file}: {error}") from error


def _overlaps(one: OwnedSlice, places: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int, str, int]]:
    """(first element, end, file, first element of the file's slice) of each stored slice that has elements of `one`."""
    for offset, size, file in places:
        start, end = max(one.start, offset), min(one.start + len(one), offset + size)
        if start < end:
            yield start, end, file, offset


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
