"""Reference of Native Sparse Attention in plain PyTorch, token by token.

Knows the definition; does not know memory or speed. Gradients come from autograd. It shares no code with `nsa`,
`compression` and `compressed_attention`.
"""

from __future__ import annotations

import itertools
import math

import torch

from dash_kernels.selection import NSA

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference_nsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    compressed_k: torch.Tensor,
    compressed_v: torch.Tensor,
    window_k: torch.Tensor,
    window_v: torch.Tensor,
    gates: torch.Tensor,
    key_weights: Weights,
    value_weights: Weights,
    *,
    selection: NSA,
    window: int,
    chunk_size: int = 64,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated sum of the three branches [B, T, Hq, D], and the chunks that each token selected, int32 [B, T, Hkv].

    The arguments are those of `nsa.nsa_attention`; weights are (positions, inner, outer).
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    out = torch.zeros_like(q)
    counts = torch.zeros(batch, length, kv_heads, dtype=torch.int32)
    for b, h, (start, end) in itertools.product(range(batch), range(kv_heads), itertools.pairwise(bounds)):
        starts = range(start, end - 31, 16)
        of_head = [[weight[h] for weight in weights] for weights in (key_weights, value_weights)]
        keys = [_turned(_compressed(compressed_k[b, i : i + 32, h], *of_head[0]), angles, i + 16) for i in starts]
        values = [_compressed(compressed_v[b, i : i + 32, h], *of_head[1]) for i in starts]
        rows = []
        for t in range(start, end):
            query, gate = q[b, t, h * group : (h + 1) * group], gates[b, t, h * group : (h + 1) * group]
            complete = sum(i + 31 <= t for i in starts)
            branches = [torch.zeros_like(query)]
            probability = torch.zeros(0, dtype=q.dtype)
            if complete:
                branches = [_attend(query, torch.stack(keys[:complete]), torch.stack(values[:complete]))]
                scores = query.detach() @ torch.stack(keys[:complete]).detach().T / math.sqrt(query.shape[-1])
                probability = torch.softmax(scores, dim=-1).sum(0)
            chosen = _chosen(probability.tolist(), t - start, chunk_size, selection)
            tokens = [s for j in chosen for s in range(start + j * chunk_size, start + (j + 1) * chunk_size) if s <= t]
            branches.append(_attend(query, k[b, tokens, h], v[b, tokens, h]))
            recent = slice(max(start, t - window + 1), t + 1)
            branches.append(_attend(query, window_k[b, recent, h], window_v[b, recent, h]))
            counts[b, t, h] = len(chosen)
            rows.append((gate.T[..., None] * torch.stack(branches)).sum(0))
        if rows:
            index = (b, slice(start, end), slice(h * group, (h + 1) * group))
            out = out.index_put(_grid(*index), torch.stack(rows))
    return out, counts


def _grid(b: int, tokens: slice, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t, h = (torch.arange(part.start, part.stop) for part in (tokens, heads))
    return torch.tensor(b), t[:, None], h


def _compressed(block: torch.Tensor, positions: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """One vector [D] for 32 tokens [32, D]."""
    return torch.relu((block + positions).flatten() @ inner) @ outer


def _turned(key: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None, token: int) -> torch.Tensor:
    """The key [D] rotated by the angles of a token."""
    if angles is None:
        return key
    half = len(key) // 2
    turn = torch.complex(angles[0][token].double(), angles[1][token].double())
    turned = torch.complex(key[:half], key[half:]) * turn
    return torch.cat((turned.real, turned.imag))


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ keys.T / math.sqrt(query.shape[-1]), dim=-1) @ values


def _chosen(probability: list[float], place: int, chunk_size: int, rule: NSA) -> list[int]:
    """Chunks of the document that its token number `place` attends to."""
    own = place // chunk_size
    worth = []
    for chunk in range(own):
        halves = range(chunk * chunk_size, (chunk + 1) * chunk_size, 16)
        # Block i begins at 16 i and has its halves there and 16 tokens further.
        overlap = [p for i, p in enumerate(probability) for half in (16 * i, 16 * i + 16) if half in halves]
        always = chunk < rule.first_chunks or own - chunk <= rule.local_chunks
        worth.append(math.inf if always else sum(overlap))
    return [*sorted(range(own), key=lambda chunk: (-worth[chunk], chunk))[: rule.count - 1], own]
