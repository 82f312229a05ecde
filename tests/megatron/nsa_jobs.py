"""What the ranks of the tests of Native Sparse Attention in models do."""

from __future__ import annotations

import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.megatron.model import build_model
from dash_dist.megatron.weights import global_name
from dash_dist.models.nsa import nsa_parameters
from tests.megatron.megatron_jobs import engine_of
from tests.support.models import CHUNK_SIZE, MODEL, SEQUENCE_LENGTH, VOCAB_SIZE, Case


class _Given:
    """Whole weights of a model without nsa layers; zeros of the optional ones."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def parameter(self, name: str) -> torch.Tensor | None:
        generator = torch.Generator().manual_seed(len(name))
        return None if name.endswith("summary_query") else torch.randn(self._shapes[name], generator=generator)


def started(case: Case) -> dict[str, bool]:
    """What a model that starts from given weights has: as the keys and values of its branches, and else."""
    with engine_of(case) as engine:
        attention = AttentionConfig(kind=case.kind, top_chunks=case.top_chunks, nsa=case.nsa, chunk_size=CHUNK_SIZE)
        ours = nsa_parameters(MODEL, attention)
        drawn = {global_name(engine.model, name): weight for name, weight in engine.model.named_parameters()}
        shapes = {}
        for name, weight in drawn.items():
            shape = list(weight.shape)
            if getattr(weight, "tensor_model_parallel", False):
                shape[weight.partition_dim] *= case.tensor
            if name not in ours:
                shapes[name] = tuple(shape)
        model = build_model(
            engine._trained.config,
            MODEL,
            attention,
            engine.dims,
            vocab_size=VOCAB_SIZE,
            sequence_length=SEQUENCE_LENGTH,
            seed=0,
            source=_Given(shapes),
        )
        layer = model.decoder.layers[1].self_attention
        angles = torch.ones(SEQUENCE_LENGTH, 4), torch.zeros(SEQUENCE_LENGTH, 4)  # no rotation
        hidden = torch.randn(SEQUENCE_LENGTH // case.tensor, 1, MODEL.hidden_size)  # this rank's shard
        branches = layer.core_attention.branches(hidden, None, angles)
        mixed = layer.linear_qkv(hidden)[0].unflatten(-1, (layer.num_query_groups_per_partition, -1, 8)).transpose(0, 1)
        found = {global_name(model, name): weight for name, weight in model.named_parameters()}
        untouched = [name for name in ours if "keys_and_values" not in name]
        return {
            "window keys": all(
                torch.allclose(keys, mixed[..., -2, :]) for keys in (branches.window_k, branches.compressed_k)
            ),
            "window values": all(
                torch.allclose(values, mixed[..., -1, :]) for values in (branches.window_v, branches.compressed_v)
            ),
            "given": not torch.equal(found["output_layer.weight"], drawn["output_layer.weight"]),
            "drawn": all(torch.equal(found[name], drawn[name]) and bool(found[name].any()) for name in untouched),
        }
