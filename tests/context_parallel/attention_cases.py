"""Shared parts of the attention's jobs: inputs, packed documents, and one call by one process or by a group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dash_dist import dash_attention, join_sequence, split_sequence
from dash_dist.context_parallel.layout import shard_chunks
from dash_dist.cost_model.topology import Topology
from dash_kernels import dash_attention as dash_attention_one_device
from dash_kernels.chunks import ChunkGrid

CHUNK, HEAD_DIM = 16, 16
LAYOUTS = ("zigzag", "contiguous")
SETTINGS: dict[str, Any] = {"chunk_size": CHUNK, "routing_scale": 60.0}
NAMES = ("output", "q", "k", "v", "summary_query")

Way = dict[str, Any]  # how K and V travel: arguments of the call


def ways() -> list[Way]:
    found: list[Way] = [{"exchange": name} for name in ("auto", "selective", "allgather", "ring")]
    if dist.get_world_size() % 2 == 0 and dist.get_world_size() > 2:
        found.append({"exchange": "selective", "ranks_per_node": 2})
    return found


def name_of(layout: str, way: Way, *others: Any) -> str:
    return ", ".join(map(str, (layout, *way.values(), *others)))


def device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@dataclass(frozen=True)
class Inputs:
    """The whole sequence, the same at every rank. bounds: chunks at which documents begin and end, None for one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    summary_query: torch.Tensor
    grad: torch.Tensor
    bounds: tuple[int, ...] | None = None

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32) * CHUNK

    def to(self, dtype: torch.dtype) -> "Inputs":
        tensors = (self.q, self.k, self.v, self.summary_query, self.grad)
        return Inputs(*(x.to(dtype) for x in tensors), self.bounds)


def same_inputs(
    chunks: int,
    dtype: torch.dtype = torch.float64,
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    bounds: tuple[int, ...] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Inputs:
    """Fresh at every run, the same at every rank of a group, or of all."""
    seed = torch.tensor([torch.seed() % 2**62], device=device())
    dist.broadcast(seed, group=group, group_src=0)
    generator = torch.Generator().manual_seed(int(seed))
    shapes = [(batch, chunks * CHUNK, count, HEAD_DIM) for count in (heads[0], heads[1], heads[1])]
    shapes += [(heads[1], HEAD_DIM), shapes[0]]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Inputs(*(x.to(device(), dtype) for x in drawn), bounds)


def crossing_documents(chunks: int) -> tuple[int, ...]:
    """Documents of one chunk, empty ones, and some that lie across the borders of shards in both layouts."""
    sizes = [1, 0, chunks // 2, 1, chunks - chunks // 2 - 2, 0]
    return (0, *torch.tensor(sizes).cumsum(0).tolist())


def padding_at(rank: int, chunks: int, layout: str) -> tuple[int, ...]:
    """All of a rank's chunks are documents of their own, as padding is: nobody asks it, and it asks nobody."""
    whole = ChunkGrid.whole_sequence(chunks * CHUNK, CHUNK)
    alone = shard_chunks(whole, rank, dist.get_world_size(), layout).ids.tolist()
    return tuple(sorted({0, chunks, *alone, *(chunk + 1 for chunk in alone)}))


def shun(inputs: Inputs, chunks: slice) -> None:
    """Puts the keys of some chunks so far from all queries that no routing selects them."""
    inputs.q[..., 0] = inputs.q[..., 0].abs() + 3
    inputs.k.unflatten(1, (-1, CHUNK))[:, chunks, ..., 0] = -20


@dataclass
class Result:
    """Output, the gradients of q, k, v and summary_query, and selected chunks per token: of a rank's shard, or all."""

    tensors: list[torch.Tensor]
    selected: torch.Tensor
    density: float

    def same_bits_as(self, other: "Result") -> bool:
        pairs = zip([*self.tensors, self.selected], [*other.tensors, other.selected], strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def differences(self, expected: "Result") -> dict[str, float]:
        """Largest difference of each, relative to the largest element; NaN counts as one."""
        found = {}
        for name, got, wanted in zip(NAMES, self.tensors, expected.tensors, strict=True):
            difference = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            found[name] = difference.nan_to_num(torch.inf).item()
        return found | {"selected": float((self.selected - expected.selected).abs().max())}


def one_process(inputs: Inputs, *, at_every_rank: bool = False, **settings: Any) -> Result:
    """Computed by rank 0 of all and given to the others, or by every rank for itself."""
    leaves = [x.clone() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query)]
    selected = torch.empty(*inputs.q.shape[:2], inputs.k.shape[2], dtype=torch.int32, device=device())
    density = torch.zeros((), dtype=torch.float64, device=device())
    tensors = [torch.empty_like(x) for x in (inputs.q, *leaves)]
    if at_every_rank or dist.get_rank() == 0:
        leaves = [x.requires_grad_() for x in leaves]
        out, routing = dash_attention_one_device(*leaves, cu_seqlens=inputs.cu_seqlens, return_routing=True, **settings)
        tensors = [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)]
        selected, density = routing.selected_per_token, routing.density
    if not at_every_rank:
        for x in (*tensors, selected, density):
            dist.broadcast(x, 0)
    return Result(tensors, selected, density.item())


def of_shard(inputs: Inputs, group: dist.ProcessGroup, layout: str, **arguments: Any) -> Result:
    """This rank's part of the call: its shard, and its own share of the gradient of summary_query."""
    shards = [split_sequence(x, group, layout=layout) for x in (inputs.q, inputs.k, inputs.v)]
    shards = [x.clone().requires_grad_() for x in (*shards, inputs.summary_query)]
    out, routing = dash_attention(
        *shards, cp_group=group, layout=layout, cu_seqlens=inputs.cu_seqlens, return_routing=True, **arguments
    )
    gradients = torch.autograd.grad(out, shards, split_sequence(inputs.grad, group, layout=layout))
    return Result([out.detach(), *gradients], routing.selected_per_token, routing.density.item())


def joined(shard: Result, group: dist.ProcessGroup, layout: str) -> Result:
    """The whole sequence's, at every rank."""
    *of_tokens, dsummary_query = shard.tensors
    dist.all_reduce(dsummary_query, group=group)
    whole = [join_sequence(x, group, layout=layout) for x in (*of_tokens, shard.selected)]
    return Result([*whole[:-1], dsummary_query], whole[-1], shard.density)


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def recorded(owner: Any, name: str) -> Iterator[list[Any]]:
    """(arguments by position, result) of a module's function, call by call."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, original(*args, **kwargs)))
        return calls[-1][1]

    with replaced(owner, name, recording):
        yield calls


@dataclass
class Counted:
    """Counts of this rank's all_to_all_single: bytes of floating-point rows for other ranks by link, calls by kind."""

    fast: int = 0
    slow: int = 0
    calls: dict[str, int] = field(default_factory=lambda: {"plan": 0, "tensors": 0})


@contextmanager
def counted(topology: Topology) -> Iterator[Counted]:
    counts = Counted()
    original = dist.all_to_all_single

    def counting(output: torch.Tensor, given: torch.Tensor, receive: list[int], send: list[int], **kwargs: Any) -> Any:
        rank = dist.get_rank()
        near = topology.node_ranks(rank)
        counts.calls["tensors" if given.is_floating_point() else "plan"] += 1
        if given.is_floating_point():
            row_bytes = given[:1].nbytes
            counts.fast += sum(rows for to, rows in enumerate(send) if to in near and to != rank) * row_bytes
            counts.slow += sum(rows for to, rows in enumerate(send) if to not in near) * row_bytes
        return original(output, given, receive, send, **kwargs)

    with replaced(dist, "all_to_all_single", counting):
        yield counts
