"""Synthetic queries, keys and values with a known correlation, drawn from a seed. Knows nothing of what is measured.

Everything is generated on the device, one head at a time in float32 and stored in the benchmark's dtype, so a million
tokens take a few of their own heads' memory and not a second copy of the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Correlation of a query component with the same component one token later.
NEIGHBOUR_CORRELATION = {"smooth": 0.98, "iid": 0.0}
SHARED_BY_GROUP = 0.8  # of a query's variance, by the heads of a KV head
SHARED_IN_CHUNK = 0.7  # of a key's variance, by the tokens of a chunk
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEED = 20260518
SCAN_TILE = 256  # tokens of the recurrence that are one matrix product


@dataclass(frozen=True)
class Case:
    """Case that one row of the benchmark measures; batch size 1.

    inputs is a key of NEIGHBOUR_CORRELATION, dtype one of DTYPES. asked_density is selected / available chunks; 1 asks
    for a routing so flat that it selects every earlier chunk.
    """

    seq_len: int
    query_heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    dtype: str
    inputs: str
    asked_density: float
    prior_sigma: float | None

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def qkv_bytes(self) -> int:
        """Size of q, k and v together."""
        heads = self.query_heads + 2 * self.kv_heads
        return self.seq_len * heads * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def available(self) -> int:
        """(token, KV head, chunk) triples that causality allows, the own chunk counted."""
        complete, rest = divmod(self.seq_len, self.chunk_size)
        return self.kv_heads * (self.chunk_size * complete * (complete + 1) // 2 + rest * (complete + 1))

    def selected_flops(self, selected: int) -> int:
        """FLOPs of the forward attention over `selected` (token, KV head, chunk) triples, the own chunks included.

        4 D for each query head and key: a multiply and an add in q . k and in p . v. An earlier chunk has chunk_size
        keys, the own chunk those up to the token itself. Summaries and routing are not counted.
        """
        complete, rest = divmod(self.seq_len, self.chunk_size)
        own_keys = complete * self.chunk_size * (self.chunk_size + 1) // 2 + rest * (rest + 1) // 2
        earlier_keys = self.chunk_size * (selected - self.seq_len * self.kv_heads)
        return 4 * self.head_dim * self.group * (earlier_keys + self.kv_heads * own_keys)


@dataclass(frozen=True)
class Inputs:
    """q and grad (the output's gradient) [1, T, Hq, D]; k, v [1, T, Hkv, D]; summary_query [Hkv, D]; one dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    summary_query: torch.Tensor
    grad: torch.Tensor


def make_inputs(case: Case, device: torch.device, seed: int = SEED) -> Inputs:
    """The inputs of a case: every component has unit variance, and the same case and seed give the same bits on one
    device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    rho = NEIGHBOUR_CORRELATION[case.inputs]

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q = torch.empty(1, case.seq_len, case.query_heads, case.head_dim, dtype=dtype, device=device)
    k = torch.empty(1, case.seq_len, case.kv_heads, case.head_dim, dtype=dtype, device=device)
    chunks = math.ceil(case.seq_len / case.chunk_size)
    for kv_head in range(case.kv_heads):
        shared = normal(case.seq_len, case.head_dim)
        for query_head in range(kv_head * case.group, (kv_head + 1) * case.group):
            # The process is linear: a sum of shared and own noise goes through it as the sum of two processes.
            noise = normal(case.seq_len, case.head_dim).mul_(math.sqrt(1 - SHARED_BY_GROUP))
            noise.add_(shared, alpha=math.sqrt(SHARED_BY_GROUP))
            q[0, :, query_head] = stationary_process(noise, rho)
        of_chunk = normal(chunks, case.head_dim).repeat_interleave(case.chunk_size, dim=0)[: case.seq_len]
        own = normal(case.seq_len, case.head_dim).mul_(math.sqrt(1 - SHARED_IN_CHUNK))
        k[0, :, kv_head] = own.add_(of_chunk, alpha=math.sqrt(SHARED_IN_CHUNK))
    v = normal(*k.shape, dtype=dtype)
    summary_query = normal(case.kv_heads, case.head_dim, dtype=dtype)
    return Inputs(q, k, v, summary_query, normal(*q.shape, dtype=dtype))


def stationary_process(noise: torch.Tensor, rho: float) -> torch.Tensor:
    """AR(1) over dim 0 of unit normal noise [T, F], unit variance from the first token on; overwrites `noise`."""
    if rho == 0:
        return noise
    noise[1:] *= math.sqrt(1 - rho**2)
    return linear_recurrence(noise, rho)


def linear_recurrence(x: torch.Tensor, rho: float) -> torch.Tensor:
    """y[0] = x[0], y[t] = rho y[t-1] + x[t] for x [T, F] in float32 and 0 < rho < 1.

    Inside tiles by a triangular matrix of powers of rho, none above 1; the tiles' last values follow the same
    recurrence with rho^SCAN_TILE, so carrying them is the same function again.
    """
    seq_len = x.shape[0]
    steps = torch.arange(min(seq_len, SCAN_TILE), device=x.device)
    decay = (rho ** (steps[:, None] - steps).clamp(min=0).to(x.dtype)).tril()  # [tile, tile]
    if seq_len <= SCAN_TILE:
        return decay @ x
    tiles = F.pad(x, (0, 0, 0, -seq_len % SCAN_TILE)).unflatten(0, (-1, SCAN_TILE))  # [n, tile, F]
    y = decay @ tiles
    carried = linear_recurrence(y[:-1, -1], rho**SCAN_TILE)  # [n - 1, F]
    y[1:].addcmul_((rho ** (steps + 1).to(x.dtype))[:, None], carried[:, None])
    return y.flatten(0, 1)[:seq_len]


def fingerprint(inputs: Inputs) -> int:
    """A number that is the same for the same bits, for a second process that draws the inputs again."""
    integers = {2: torch.int16, 4: torch.int32}
    return sum(
        position * int(x.view(integers[x.element_size()]).sum(dtype=torch.int64))
        for position, x in enumerate(vars(inputs).values(), start=1)
    )
