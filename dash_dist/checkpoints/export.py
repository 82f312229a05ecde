"""The weights of a checkpoint alone, as a Hugging Face model of the run's family.

Knows the files of a checkpoint; `dash_dist.models` knows the names and the order of weights. Does not import
Megatron-core, needs no GPU, and holds no more than one output file in memory.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dash_dist.checkpoints.engine_state import LORA, EngineState, read_engine_state
from dash_dist.checkpoints.pickles import INDEX, FileSection, read_index
from dash_dist.config.model import ModelConfig
from dash_dist.config.trainable import LoraConfig
from dash_dist.models.hugging_face import config_of
from dash_dist.models.lora import AdapterEntry, adapter_table, merged, peft_config
from dash_dist.models.table import Entry, parameter_table
from dash_dist.models.windows import attention_from

SHARD_BYTES = 5 * 10**9
"""Of one output file, unless a single tensor is larger: what Hugging Face's own tools use."""


class _Weights:
    """The tensors of a distributed checkpoint, put together from what the ranks wrote, one at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index = read_index(directory / INDEX)

    def described(self, key: str) -> TensorStorageMetadata:
        """Size, dtype and chunks of one tensor. Raises ValueError if there is none of that name."""
        tensor = self._index.state_dict_metadata.get(key)
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{self._directory / INDEX} has no tensor {key}: not a checkpoint of this engine")
        return tensor

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """One tensor, of one layer where those of all layers are stacked under one name."""
        tensor = self.described(key)
        whole = torch.empty(tensor.size if layer is None else tensor.size[1:], dtype=tensor.properties.dtype)
        filled = 0
        for chunk in tensor.chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            if layer is not None:
                if offsets.pop(0) != layer:
                    continue
                sizes.pop(0)
            place = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
            place.copy_(self._read_chunk(MetadataIndex(key, chunk.offsets)).reshape(sizes))
            filled += place.numel()
        if filled != whole.numel():
            raise ValueError(f"{self._directory / INDEX} does not say where all of {key} is")
        return whole

    def _read_chunk(self, index: MetadataIndex) -> torch.Tensor:
        place = self._index.storage_data[index]
        with (self._directory / place.relative_path).open("rb") as file:
            section = io.BufferedReader(FileSection(file, place.offset, place.length))
            return torch.load(section, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class _Output:
    """One tensor of the export, of `shape`: part number `part` of a parameter."""

    name: str
    shape: tuple[int, ...]
    entry: Entry
    part: int


def export_weights(
    directory: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the weights in `directory`, an engine's verified checkpoint, to `out`.

    `out` gets safetensors files, their index where there are several, and last a `config.json` of the run's family,
    with windows as that family spells them, and the attention's settings as `dash_attention`. transformers reads it as
    that model with dense attention where ours is dash; the `summary_query` of those layers is there as
    `model.layers.N.self_attn.summary_query`, [num_kv_heads, head_dim], which it leaves out. A run without dash layers
    has neither, except that `dash_attention` holds windows that the family cannot spell.

    LoRA adapters are merged into their weights.

    Args:
        out: new or empty.
        shard_bytes: of the tensors in one file.
        progress: told each file that is written.

    Raises:
        ValueError: the checkpoint is not one of this engine, or has layers that only this project computes; or `out`
            is not empty.
        OSError: a file cannot be read or written.
    """
    run = read_engine_state(directory)
    weights = _Weights(directory)
    model, vocab_size = _model_of(run), run.identity["vocab_size"]
    settings = _attention_of(run)
    kinds = attention_from(settings).kinds(model.num_layers)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: export to a new folder")
    outputs = list(_outputs(model, vocab_size, kinds))
    adapters = _adapters(run, model, weights)
    dtypes = [weights.described(output.entry.checkpoint_key[0]).properties.dtype for output in outputs]
    sizes = [dtype.itemsize * math.prod(output.shape) for dtype, output in zip(dtypes, outputs, strict=True)]
    shards = _shards(outputs, sizes, shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {output.name: _read(weights, output, adapters) for output in shard}
        save_file(tensors, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o666 & out.stat().st_mode)  # safetensors makes files that only their owner can read
        places |= dict.fromkeys(tensors, name)
        progress(name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = config_of(
        model,
        settings,
        vocab_size=vocab_size,
        sequence_length=run.sequence_length,
        dtype=str(dtypes[0]).removeprefix("torch."),
    )
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _outputs(model: ModelConfig, vocab_size: int, kinds: Sequence[str]) -> Iterator[_Output]:
    for entry in parameter_table(model, vocab_size).values():
        _, layer = entry.checkpoint_key
        if entry.optional and layer is not None and kinds[layer] != "dash":  # summary_query, which they do not read
            continue
        for part, (name, shape) in enumerate(entry.tensors.items()):
            yield _Output(name, shape, entry, part)


def _shards(outputs: list[_Output], sizes: list[int], shard_bytes: int) -> list[list[_Output]]:
    """Cut the list where the next tensor would be too much for a file."""
    shards: list[list[_Output]] = []
    used = shard_bytes
    for output, size in zip(outputs, sizes, strict=True):
        if used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(output)
        used += size
    return shards


def export_adapters(directory: Path, out: Path, *, base: str | None) -> None:
    """Write the LoRA adapters in `directory`, an engine's verified checkpoint, as `peft` reads them.

    `out` gets `adapter_config.json`, `adapter_model.safetensors`, and `summary_query.safetensors` with the routing of
    each layer, which `peft` does not read.

    Args:
        out: new or empty.
        base: folder or name of the model under the adapters; None if there is none.

    Raises:
        ValueError: the checkpoint has no adapters or is not one of this engine; or `out` is not empty.
        OSError: a file cannot be read or written.
    """
    run = read_engine_state(directory)
    lora, model, weights = _lora_of(run), _model_of(run), _Weights(directory)
    if lora is None:
        raise ValueError("it has no adapters: export it without --adapter")
    kinds = attention_from(_attention_of(run)).kinds(model.num_layers)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: export to a new folder")
    tensors = {
        entry.peft_name(matrix): weights.read(entry.checkpoint_key(matrix), entry.layer)
        for entry in adapter_table(model, lora)
        for matrix in ("a", "b")
    }
    queries = {
        output.name: _read(weights, output, {})
        for output in _outputs(model, run.identity["vocab_size"], kinds)
        if output.entry.optional
    }
    files = {"adapter_model.safetensors": tensors} | ({"summary_query.safetensors": queries} if queries else {})
    for name, content in files.items():
        save_file(content, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o666 & out.stat().st_mode)
    (out / "adapter_config.json").write_text(json.dumps(peft_config(lora, base), indent=2) + "\n")


def _attention_of(run: EngineState) -> dict[str, Any]:
    return {
        name.removeprefix("attention."): value for name, value in run.function.items() if name.startswith("attention.")
    }


Adapters = dict[str, Callable[[torch.Tensor], torch.Tensor]]
"""Merges by the name of the weight in the export."""


def _adapters(run: EngineState, model: ModelConfig, weights: _Weights) -> Adapters:
    lora = _lora_of(run)
    if lora is None:
        return {}

    def merge(entry: AdapterEntry, weight: torch.Tensor) -> torch.Tensor:
        a, b = (weights.read(entry.checkpoint_key(matrix), entry.layer) for matrix in ("a", "b"))
        return merged(weight, a, b, lora.scale)

    return {entry.weight: functools.partial(merge, entry) for entry in adapter_table(model, lora)}


def _lora_of(run: EngineState) -> LoraConfig | None:
    described = run.identity.get(LORA)
    return None if described is None else LoraConfig.model_validate(described)


def _read(weights: _Weights, output: _Output, adapters: Adapters) -> torch.Tensor:
    key, layer = output.entry.checkpoint_key
    tensor = output.entry.split(weights.read(key, layer))[output.part].contiguous()
    if tensor.shape != output.shape:
        raise ValueError(f"{key} gives {output.name} the shape {list(tensor.shape)}, not {list(output.shape)}")
    if output.name in adapters:
        return adapters[output.name](tensor)
    return tensor.clone()  # of a slice's own, not the whole tensor's memory


def _model_of(run: EngineState) -> ModelConfig:
    """The section `model` that the checkpoint was trained with, without what the function does not depend on."""
    known = ModelConfig.model_fields.keys() - {"vocab_size"}
    settings = {name: value for name, value in run.identity.items() if name in known}
    settings |= {
        name.removeprefix("model."): value for name, value in run.function.items() if name.startswith("model.")
    }
    return ModelConfig.model_validate(settings)
