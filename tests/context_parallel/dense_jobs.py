"""What the ranks of the tests of dense attention do."""

import torch
import torch.distributed as dist

from dash_dist.context_parallel import DashAttention, join_sequence, split_sequence

CHUNK = 16


def inputs() -> tuple[torch.Tensor, ...]:
    """Return q [1, 192, 4, 16], k, v [1, 192, 2, 16] and a gradient of the output, in float64."""
    generator = torch.Generator().manual_seed(7)
    heads = (4, 2, 2, 4)
    tensors = [torch.randn(1, 192, number, 16, generator=generator, dtype=torch.float64) for number in heads]
    return *(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]


def attend(exchange: str) -> dict[str, torch.Tensor]:
    """Output and gradients of the whole sequence."""
    group = dist.group.WORLD
    shards = [split_sequence(tensor.detach(), group).clone() for tensor in inputs()]
    q, k, v = (tensor.requires_grad_() for tensor in shards[:3])
    module = DashAttention(2, 16, chunk_size=CHUNK, dense=True, dtype=torch.float64, cp_group=group, exchange=exchange)
    out = module(q, k, v)
    dq, dk, dv, dsummary_query = torch.autograd.grad(out, (q, k, v, module.summary_query), shards[3])
    whole = {name: join_sequence(one, group) for name, one in zip("qkv", (dq, dk, dv), strict=True)}
    return whole | {"out": join_sequence(out.detach(), group), "summary_query": dsummary_query}
