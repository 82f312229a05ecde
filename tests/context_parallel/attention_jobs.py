"""What the ranks of the attention tests do. Every job runs many cases in the same processes."""

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist

from dash_dist import DashAttention, dash_attention, join_sequence, shard_positions, split_sequence
from dash_kernels import dash_attention as dash_attention_one_device

CHUNK = 16
LAYOUTS = ("zigzag", "contiguous")
EXCHANGES = ("selective", "allgather", "ring")
SETTINGS: dict[str, Any] = {"chunk_size": CHUNK, "routing_scale": 12.0}


def device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def same_inputs(chunks: int, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (8, 2)) -> list[torch.Tensor]:
    """q, k, v, summary_query and the output's gradient: fresh at every run, the same at every rank."""
    seed = torch.tensor([torch.seed() % 2**62], device=device())
    dist.broadcast(seed, 0)
    generator = torch.Generator().manual_seed(int(seed))
    shapes = [(2, chunks * CHUNK, count, 16) for count in (heads[0], heads[1], heads[1])]
    shapes += [(heads[1], 16), shapes[0]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device(), dtype) for shape in shapes]


def differences_from_one_process(
    inputs: list[torch.Tensor], layout: str, exchange: str, **settings: Any
) -> dict[str, float]:
    """Largest difference of the output and of every gradient, over all ranks' shards together, relative to the largest
    element.
    """
    group = dist.group.WORLD
    *leaves, grad = inputs
    whole = [x.clone().requires_grad_() for x in leaves]
    out, routing = dash_attention_one_device(*whole, return_routing=True, **settings)
    expected = [out, *torch.autograd.grad(out, whole, grad)]

    shards = [split_sequence(x, group, layout=layout).requires_grad_() for x in leaves[:3]]
    shards.append(leaves[3].clone().requires_grad_())
    own, own_routing = dash_attention(
        *shards, cp_group=group, layout=layout, exchange=exchange, return_routing=True, **settings
    )
    *gradients, dsummary_query = torch.autograd.grad(own, shards, split_sequence(grad, group, layout=layout))
    dist.all_reduce(dsummary_query)
    joined = [join_sequence(x, group, layout=layout) for x in (own, *gradients)] + [dsummary_query]
    names = ("output", "q", "k", "v", "summary_query")
    result = {
        name: ((got - wanted).abs().max() / wanted.abs().max()).item()
        for name, got, wanted in zip(names, joined, expected, strict=True)
    }
    selected = join_sequence(own_routing.selected_per_token, group, layout=layout)
    result["selected"] = (selected - routing.selected_per_token).abs().max().item()
    result["density"] = routing.density.item()
    return result


def parity() -> dict[tuple[Any, ...], dict[str, float]]:
    chunks = 4 * dist.get_world_size()
    return {
        (layout, exchange, prior_sigma, alpha): differences_from_one_process(
            same_inputs(chunks), layout, exchange, prior_sigma=prior_sigma, alpha=alpha, **SETTINGS
        )
        for layout, exchange, (prior_sigma, alpha) in itertools.product(
            LAYOUTS, EXCHANGES, ((None, 1.5), (1.0, 1.5), (None, 1.8))
        )
    }


def parity_of_the_smallest_shards() -> dict[tuple[Any, ...], dict[str, float]]:
    """One chunk per rank."""
    inputs = same_inputs(dist.get_world_size(), heads=(3, 3))
    sharp = {"chunk_size": CHUNK, "routing_scale": 100.0}
    return {exchange: differences_from_one_process(inputs, "contiguous", exchange, **sharp) for exchange in EXCHANGES}


def triton_parity() -> dict[str, float]:
    """bfloat16 kernels under NCCL against one GPU."""
    inputs = same_inputs(64, torch.bfloat16)
    return differences_from_one_process(inputs, "zigzag", "ring", backend="triton", **SETTINGS)


def interpreted_triton_parity() -> dict[str, float]:
    """The kernels in float32 through Triton's interpreter, on a sequence that is small enough for it."""
    inputs = same_inputs(2 * dist.get_world_size(), torch.float32, heads=(2, 1))
    call: dict[str, Any] = {"chunk_size": CHUNK, "routing_scale": 30.0, "backend": "triton"}
    return differences_from_one_process(inputs, "zigzag", "ring", **call)


def first_token_reaches_the_last_rank() -> dict[str, float]:
    """By how much the last token of the last rank's shard changes with the sequence's first token, held by rank 0."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    result = {}
    for layout, exchange in itertools.product(LAYOUTS, EXCHANGES):
        q, k, v, c, _ = same_inputs(4 * size)
        observed = int(shard_positions(q.shape[1], size - 1, size, layout)[-1])
        # Its routing is sure to select the first chunk.
        k[:, :CHUNK] = q[:, observed].unflatten(1, (2, -1)).mean(2).unsqueeze(1) * 10
        changed_v = v.clone()
        changed_v[:, 0] += 1.0
        out, changed = (
            dash_attention(
                *(split_sequence(x, group, layout=layout) for x in (q, k, values)),
                c,
                cp_group=group,
                layout=layout,
                exchange=exchange,
                **SETTINGS,
            )
            for values in (v, changed_v)
        )
        if rank == size - 1:
            result[f"{layout}/{exchange}"] = (out - changed)[:, -1].abs().max().item()
    return result


def errors_at_every_rank() -> dict[str, str]:
    """One rank's mistake is everybody's ValueError."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

    def call(length: int, **change: Any) -> str:
        q, k, v = (torch.randn(1, length, heads, 16, device=device()) for heads in (4, 2, 2))
        settings = {"chunk_size": CHUNK, "cp_group": group} | change
        try:
            dash_attention(q, k, v, torch.zeros(2, 16, device=device()), **settings)
        except ValueError as error:
            return str(error)
        return "no error"

    return {
        "not a multiple": call(3 * CHUNK),
        "one rank's alpha": call(4 * CHUNK, alpha=3.0 if rank == size - 1 else 1.5),
        "different lengths": call(4 * CHUNK if rank else 2 * CHUNK),
        "different layouts": call(4 * CHUNK, layout="zigzag" if rank else "contiguous"),
        "unknown layout": call(4 * CHUNK, layout="spiral"),
        "unknown exchange": call(4 * CHUNK, exchange="pigeon"),
        "good afterwards": call(4 * CHUNK),
    }


def split_and_join() -> dict[str, bool]:
    group, size = dist.group.WORLD, dist.get_world_size()
    result = {}
    for layout, dim in itertools.product(LAYOUTS, (0, 1)):
        shape = (8 * size, 3) if dim == 0 else (3, 8 * size)
        x = torch.arange(math.prod(shape), dtype=torch.float64, device=device()).view(shape).requires_grad_()
        shard = split_sequence(x, group, layout=layout, dim=dim)
        joined = join_sequence(shard, group, layout=layout, dim=dim)
        weights = torch.linspace(0, 1, x.numel(), dtype=torch.float64, device=device()).view(shape)
        (grad,) = torch.autograd.grad((joined * weights).sum(), x)
        result[f"{layout}/{dim}"] = bool(torch.equal(joined, x) and torch.equal(grad, weights))
    return result


def module_trains() -> list[float]:
    """A module's parameter gets the shard's part of the gradient; the sum is the whole one."""
    group = dist.group.WORLD
    q, k, v, c, grad = same_inputs(4 * dist.get_world_size())
    module = DashAttention(2, 16, cp_group=group, dtype=torch.float64, device=device(), **SETTINGS)
    module.record_routing = True
    shards = [split_sequence(x, group) for x in (q, k, v)]
    (module(*shards) * split_sequence(grad, group)).sum().backward()
    assert module.routing is not None
    assert module.summary_query.grad is not None
    dist.all_reduce(module.summary_query.grad)
    zeros = torch.zeros_like(c, requires_grad=True)
    (wanted,) = torch.autograd.grad(dash_attention_one_device(q, k, v, zeros, **SETTINGS), zeros, grad)
    return [(module.summary_query.grad - wanted).abs().max().item(), wanted.abs().max().item()]
