"""The weights of a checkpoint alone, as safetensors with the names of Hugging Face's Llama.

Knows Megatron-core's names and order of weights and Hugging Face's. Does not import Megatron-core, needs no GPU, and
holds no more than one output file in memory.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dash_dist.checkpoints.engine_state import EngineState, read_engine_state
from dash_dist.checkpoints.pickles import INDEX, FileSection, read_index

SHARD_BYTES = 5 * 10**9
"""Of one output file, unless a single tensor is larger: what Hugging Face's own tools use."""

_LAYERS = "decoder.layers"
_Convert = Callable[[torch.Tensor], torch.Tensor]


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
    """One tensor of the export, of `shape`: `convert` of the checkpoint's `key`, in `layer` where that has several."""

    name: str
    shape: tuple[int, ...]
    key: str
    layer: int | None
    convert: _Convert


def export_weights(
    directory: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the weights in `directory`, an engine's verified checkpoint, to `out`.

    `out` gets safetensors files, their index where there are several, and last a `config.json` of a Llama with the
    attention's settings as `dash_attention`. transformers reads it as a Llama with dense attention; the `summary_query`
    of each layer is there as `model.layers.N.self_attn.summary_query`, [num_kv_heads, head_dim], which it leaves out.

    Args:
        out: new or empty.
        shard_bytes: of the tensors in one file.
        progress: told each file that is written.

    Raises:
        ValueError: the checkpoint is not one of this engine; or `out` is not empty.
        OSError: a file cannot be read or written.
    """
    run = read_engine_state(directory)
    weights = _Weights(directory)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: export to a new folder")
    outputs = list(_outputs(run))
    dtypes = [weights.described(output.key).properties.dtype for output in outputs]
    sizes = [dtype.itemsize * math.prod(output.shape) for dtype, output in zip(dtypes, outputs, strict=True)]
    shards = _shards(outputs, sizes, shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {output.name: _read(weights, output) for output in shard}
        save_file(tensors, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o666 & out.stat().st_mode)  # safetensors makes files that only their owner can read
        places |= dict.fromkeys(tensors, name)
        progress(name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = _llama_config(run, dtypes[0])
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _outputs(run: EngineState) -> Iterator[_Output]:
    model = run.identity
    vocab, hidden, ffn = model["vocab_size"], model["hidden_size"], model["ffn_hidden_size"]
    heads, kv_heads, head_dim = model["num_attention_heads"], model["num_kv_heads"], model["head_dim"]

    def rows(first: int, last: int) -> _Convert:
        return lambda weight: weight[first:last]

    def heads_of_groups(first: int, last: int) -> _Convert:
        """Megatron keeps the query heads, the key head and the value head of each KV head together."""
        return lambda weight: weight.view(kv_heads, -1, head_dim, hidden)[:, first:last].reshape(-1, hidden)

    whole: _Convert = lambda weight: weight  # noqa: E731
    per_group = heads // kv_heads
    # The embedding has more rows than the tokenizer has tokens.
    yield _Output(
        "model.embed_tokens.weight", (vocab, hidden), "embedding.word_embeddings.weight", None, rows(0, vocab)
    )
    of_layer: list[tuple[str, tuple[int, ...], str, _Convert]] = [
        ("input_layernorm.weight", (hidden,), "self_attention.linear_qkv.layer_norm_weight", whole),
        (
            "self_attn.q_proj.weight",
            (heads * head_dim, hidden),
            "self_attention.linear_qkv.weight",
            heads_of_groups(0, per_group),
        ),
        (
            "self_attn.k_proj.weight",
            (kv_heads * head_dim, hidden),
            "self_attention.linear_qkv.weight",
            heads_of_groups(per_group, per_group + 1),
        ),
        (
            "self_attn.v_proj.weight",
            (kv_heads * head_dim, hidden),
            "self_attention.linear_qkv.weight",
            heads_of_groups(per_group + 1, per_group + 2),
        ),
        ("self_attn.o_proj.weight", (hidden, heads * head_dim), "self_attention.linear_proj.weight", whole),
        (
            "self_attn.summary_query",
            (kv_heads, head_dim),
            "self_attention.core_attention.attention.summary_query",
            whole,
        ),
        ("post_attention_layernorm.weight", (hidden,), "mlp.linear_fc1.layer_norm_weight", whole),
        ("mlp.gate_proj.weight", (ffn, hidden), "mlp.linear_fc1.weight", rows(0, ffn)),
        ("mlp.up_proj.weight", (ffn, hidden), "mlp.linear_fc1.weight", rows(ffn, 2 * ffn)),
        ("mlp.down_proj.weight", (hidden, ffn), "mlp.linear_fc2.weight", whole),
    ]
    for layer in range(model["num_layers"]):
        for name, shape, key, convert in of_layer:
            yield _Output(f"model.layers.{layer}.{name}", shape, f"{_LAYERS}.{key}", layer, convert)
    yield _Output("model.norm.weight", (hidden,), "decoder.final_layernorm.weight", None, whole)
    if not model["tie_embeddings"]:
        yield _Output("lm_head.weight", (vocab, hidden), "output_layer.weight", None, rows(0, vocab))


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


def _read(weights: _Weights, output: _Output) -> torch.Tensor:
    tensor = output.convert(weights.read(output.key, output.layer)).contiguous()
    if tensor.shape != output.shape:
        raise ValueError(f"{output.key} gives {output.name} the shape {list(tensor.shape)}, not {list(output.shape)}")
    return tensor.clone()  # of a slice's own, not the whole tensor's memory


def _llama_config(run: EngineState, dtype: torch.dtype) -> dict[str, Any]:
    model, function = run.identity, run.function
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["ffn_hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_attention_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["head_dim"],
        "vocab_size": model["vocab_size"],
        "max_position_embeddings": run.sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": function["model.norm_epsilon"],
        "rope_theta": function["model.rotary_base"],
        "tie_word_embeddings": model["tie_embeddings"],
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "dash_attention": {
            name.removeprefix("attention."): value for name, value in function.items() if name.startswith("attention.")
        },
    }
