"""This project's attention on one rank's inputs: the calls that are timed, and what their routing selects."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dash_dist import dash_attention
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.shard import Shard
from dash_kernels.backend import select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.limits import MAX_TRITON_SHARPNESS
from dash_kernels.spec import AttentionSpec
from tools.benchmarks.common.inputs import Case
from tools.benchmarks.context_parallel.inputs import repeated, shard_inputs
from tools.benchmarks.context_parallel.ranks import Ranks
from tools.benchmarks.context_parallel.results import Counters
from tools.benchmarks.context_parallel.timing import Mark, Step
from tools.benchmarks.kernels.density import AIM, find_routing_scale

# Routes to the fewest chunks that the kernels take: all of a call's kernels and collectives in a fraction of its time.
SPARSEST = MAX_TRITON_SHARPNESS
FEWEST_CHUNKS = 2  # of the shortest piece whose coverage is looked at


class Problem:
    """One case on one rank: over all ranks in a layout, or on each rank alone.

    Alone, every rank has `sequences` equal sequences of case.seq_len of its own, the same at all of them.
    """

    def __init__(
        self, case: Case, ranks: Ranks, *, layout: str = "zigzag", alone: bool = False, sequences: int = 1
    ) -> None:
        self.case, self.layout, self._sequences = case, layout, sequences
        self._ranks, self._group = ranks, None if alone else ranks.group
        rank, size = (0, 1) if alone else (ranks.rank, ranks.size)
        self.inputs = repeated(shard_inputs(case, rank, size, layout, ranks.device), sequences)
        whole = ChunkGrid.whole_sequence(case.seq_len, case.chunk_size)
        self._shard = None if alone else Shard(ranks.group, layout, whole, case.chunk_size)
        self._chunks = whole if self._shard is None else self._shard.chunks
        self._traffic = Traffic()
        self._stages = select_backend("auto", self.inputs.q, case.kv_heads, self._spec(1.0))

    def step(self, routing_scale: float, exchange: str) -> Step:
        """A training step's share: the output, and the gradients of q, k, v and summary_query."""
        inputs = self.inputs
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query)]
        q, k, v, summary_query = leaves

        def call(after_forward: Mark) -> Sequence[torch.Tensor]:
            self._traffic = Traffic()
            out = dash_attention(
                q,
                k,
                v,
                summary_query,
                chunk_size=self.case.chunk_size,
                routing_scale=routing_scale,
                prior_sigma=self.case.prior_sigma,
                cp_group=self._group,
                layout=self.layout,
                exchange=exchange,
                traffic=self._traffic,
            )
            after_forward()
            return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)

        return call

    def counters(self) -> Counters:
        """Return the traffic of the last call of a `step`, over all ranks. A collective call."""
        return Counters.over_ranks(self._ranks.gather(self._traffic.take()))

    def routing_step(self, routing_scale: float) -> Step:
        """Stages 1 and 2 alone: the summaries, gathered from all ranks, and the routing."""

        def call(after_forward: Mark) -> Sequence[torch.Tensor]:
            selected = self._selected_per_token(routing_scale)
            after_forward()
            return (selected,)

        return call

    def selected(self, routing_scale: float) -> list[int]:
        """(token, KV head, chunk) triples that each rank's queries select, own chunks included."""
        return self._ranks.gather(int(self._selected_per_token(routing_scale).sum(dtype=torch.int64)))

    def coverage(self, routing_scale: float) -> dict[str, float]:
        """By a number of tokens: the share of the chunks before them that the sequence's last so many tokens select
        any of, on average over KV heads. Up to the length of a piece, which of all ranks the first holds the last of.

        What a rank needs is decided by its late piece: this is what ranks of larger groups would need.
        """
        case, spec = self.case, self._spec(routing_scale)
        summaries, shares = self._gathered_summaries(spec), {}
        n, tokens = summaries.shape[1], self.inputs.q.shape[1] // 2
        while tokens >= FEWEST_CHUNKS * case.chunk_size:
            chunks = ChunkGrid.complete(range(n - tokens // case.chunk_size, n), case.chunk_size)
            routing = self._stages.route(self.inputs.q[:, -tokens:], chunks, summaries, spec)
            reached = self._stages.reached(routing, chunks, n, spec)[..., : n - len(chunks)]
            shares[str(tokens)] = reached.double().mean().item()
            tokens //= 2
        return self._ranks.gather(shares)[0]

    def find_routing_scale(self, aim: float = AIM) -> float:
        """The scale with the case's density over all ranks; see `kernel_benchmark.density.find_routing_scale`.

        Raises ValueError at every rank where none has it.
        """

        def density(routing_scale: float) -> float:
            selected = self.selected(routing_scale)
            return (selected[0] if self._group is None else sum(selected)) / (self._sequences * self.case.available)

        return find_routing_scale(density, self.case, aim)

    def _selected_per_token(self, routing_scale: float) -> torch.Tensor:
        spec = self._spec(routing_scale)
        return self._stages.route(self.inputs.q, self._chunks, self._gathered_summaries(spec), spec).selected

    def _gathered_summaries(self, spec: AttentionSpec) -> torch.Tensor:
        summaries = self._stages.summarize(self.inputs.k, self._chunks, self.inputs.summary_query, spec)
        return summaries if self._shard is None else self._shard.gather_summaries(summaries)

    def _spec(self, routing_scale: float) -> AttentionSpec:
        return AttentionSpec(
            chunk_size=self.case.chunk_size,
            alpha=1.5,
            routing_scale=routing_scale,
            prior_sigma=self.case.prior_sigma,
        ).for_head_dim(self.case.head_dim)
