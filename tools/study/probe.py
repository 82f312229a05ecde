"""Attention of the tokens that end questions: its mass on the chunks of the evidence, and its entropy.

Knows the inputs of attention modules and the stages of the kernels; does not know tasks. Everything is computed again
in float32 from q, k and v, for the asked tokens alone: memory is that of their scores against all keys of one layer.
Of nsa, only the selected branch counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from dash_dist.context_parallel import DashAttention, NSAAttention
from dash_kernels import ChunkGrid
from dash_kernels.backend import select_backend
from dash_kernels.eager_selection import probabilities, routing_scores
from dash_kernels.spec import AttentionSpec, Routing


@dataclass(frozen=True)
class LayerProbe:
    """Attention of one layer, mean over the asked tokens of a text.

    Attributes:
        mass: of the evidence's chunks in the attention, of the query head that has most.
        entropy: of the attention over chunks in nats, mean over the query heads.
        found: share of the evidence's chunks that are selected, of the KV head that selects most; 1 where attention
            is dense.
        summary_query_norm: mean over the KV heads.
    """

    mass: float
    entropy: float
    found: float
    summary_query_norm: float


@dataclass
class Probe:
    """Probes of the layers in the order of their calls.

    Attributes:
        places: tokens that are asked.
        evidence: for each of them, places of its evidence.
    """

    places: Sequence[int]
    evidence: Sequence[Sequence[int]]
    layers: list[LayerProbe] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Probe every attention that is called in this block, on one sequence of one document."""
        handle = register_module_forward_hook(self._hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _hook(self, module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        if not isinstance(module, DashAttention):
            return
        q, k = inputs[:2]
        weights, selected = attention_of(module, q, k, options.get("branches"), self.places)
        by_chunk = _by_chunk(weights, module.spec.chunk_size)
        marks = torch.zeros(len(self.places), by_chunk.shape[-1], dtype=torch.bool, device=q.device)
        for row, places in zip(marks, self.evidence, strict=True):
            row[torch.tensor(places, device=q.device) // module.spec.chunk_size] = True
        mass = (by_chunk * marks).sum(-1).mean(-1)
        entropy = -torch.xlogy(by_chunk, by_chunk).sum(-1)
        found = (selected & marks).sum(-1) / marks.sum(-1)
        norm = module.summary_query.float().norm(dim=-1).mean()
        self.layers.append(
            LayerProbe(float(mass.max()), float(entropy.mean()), float(found.mean(-1).max()), float(norm))
        )


def attention_of(
    module: DashAttention, q: torch.Tensor, k: torch.Tensor, branches: Any, places: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the softmax weights of some tokens of one sequence, and the chunks that they select.

    Args:
        q, k: [1, T, H, D].
        branches: of nsa.

    Returns:
        Weights [Hq, places, T], and bool [Hkv, places, chunks], the own chunk included.
    """
    spec = module.spec.for_head_dim(q.shape[-1])
    tokens = torch.tensor(places, device=q.device)
    q, k = q.float(), k.float()
    bias = _bias(module, q, k, branches, spec, tokens)  # [Hkv, places, chunks]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("phd,thd->hpt", q[0, tokens] * spec.scale, k[0].repeat_interleave(group, dim=1))
    scores += bias.repeat_interleave(spec.chunk_size, dim=-1)[..., : k.shape[1]].repeat_interleave(group, dim=0)
    future = torch.arange(k.shape[1], device=q.device) > tokens.unsqueeze(-1)
    return torch.softmax(scores.masked_fill_(future, -torch.inf), dim=-1), bias > -torch.inf


def _bias(
    module: DashAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    branches: Any,
    spec: AttentionSpec,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Bias of every chunk for the tokens, -inf where it is not selected."""
    own = tokens // spec.chunk_size
    chunks = ChunkGrid.whole_sequence(q.shape[1], spec.chunk_size)
    bias = torch.full((k.shape[2], len(tokens), len(chunks)), -torch.inf, device=q.device)
    earlier = torch.arange(len(chunks), device=q.device) < own.unsqueeze(-1)
    if module.dense:
        bias.masked_fill_(earlier, 0.0)
    else:
        stages = select_backend("eager", q, k.shape[2], spec)
        if isinstance(module, NSAAttention):
            summaries = module.summaries(branches, chunks, None, spec).float()
        else:
            summaries = stages.summarize(k, chunks, module.summary_query.float(), spec)
        # The asked tokens are at the end of long texts: only their chunks and later ones are routed.
        first = int(own.min())
        last = q[:, first * spec.chunk_size :]
        routing = stages.route(last, chunks.take(range(first, len(chunks))), summaries, spec)
        routed = _routed(last, summaries, routing, spec, tokens - first * spec.chunk_size)
        if spec.attend_first_chunk:
            routed[..., 0] = 0.0
        bias = torch.where(earlier, routed, bias)
    return bias.scatter_(-1, own.expand(len(bias), -1).unsqueeze(-1), 0.0)


def _routed(
    q: torch.Tensor, summaries: torch.Tensor, routing: Routing, spec: AttentionSpec, tokens: torch.Tensor
) -> torch.Tensor:
    """Bias of the chunks for the tokens by their routing, as if each of them were before the token."""
    n, kv_heads = summaries.shape[1:3]
    if routing.lists is not None:
        marks = routing.listed(slice(0, q.shape[1]), n)[0, :, tokens]
        return torch.where(marks, 0.0, -torch.inf)
    rows = q[:, tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [1, Hkv, G, places, D]
    tau = routing.tau[:, tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1)
    prior = probabilities(routing_scores(rows, summaries, spec), tau, spec).mean(2)[0]
    log_mean = routing.log_mean[0, tokens].T.unsqueeze(-1)
    return (prior.log() - log_mean) * spec.prior_exponent


def _by_chunk(weights: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Sum weights [..., T] over each chunk."""
    padding = -weights.shape[-1] % chunk_size
    return torch.nn.functional.pad(weights, (0, padding)).unflatten(-1, (-1, chunk_size)).sum(-1)
