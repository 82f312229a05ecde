"""Rotary positions, and queries, keys and values taken out of one projection, each in one pass over memory.

Knows heads, angles and Megatron-core's order of a projection; does not know attention. Takes Triton on GPUs, and
PyTorch elsewhere.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dash_kernels.spec import accumulation_dtype, require


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate the channels i and i + D / 2 of every head by the angle of their token.

    Args:
        x: [B, T, H, D], contiguous in D.
        cosines, sines: [T, D / 2] float32, contiguous, the same for the whole batch, without gradients.

    Returns:
        [B, T, H, D] in x's dtype, contiguous; computed in float32, in float64 for float64 inputs.

    Raises:
        ValueError: the shapes do not fit.
    """
    require(
        x.dim() == 4 and x.shape[-1] % 2 == 0 and x.stride(-1) == 1,
        f"x has shape {tuple(x.shape)}: give [B, T, H, D], contiguous in an even D",
    )
    _check_angles(cosines, sines, x.shape[1], x.shape[3])
    rotated: torch.Tensor = _Rotate.apply(x, cosines, sines)
    return rotated


def split_projection(
    mixed: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    cosines: torch.Tensor | None = None,
    sines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take queries, keys and values out of a projection, and rotate queries and keys.

    Args:
        mixed: [T, B, num_kv_heads x (G + 2) x head_dim]: for each KV head its G query heads, its key and its value.
        cosines, sines: [T, head_dim / 2] float32, see `rotate`; None leaves queries and keys as they are.

    Returns:
        Contiguous q [B, T, num_kv_heads x G, head_dim], k and v [B, T, num_kv_heads, head_dim], in mixed's dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    heads, rest = divmod(mixed.shape[-1], num_kv_heads * head_dim)
    require(
        mixed.dim() == 3 and rest == 0 and heads > 2 and mixed.stride(-1) == 1 and head_dim % 2 == 0,
        f"mixed has shape {tuple(mixed.shape)}: give [T, B, {num_kv_heads} x (G + 2) x {head_dim}] with G above 0 and "
        "an even head_dim",
    )
    if cosines is not None and sines is not None:
        _check_angles(cosines, sines, mixed.shape[0], head_dim)
    q, k, v = _Split.apply(mixed, num_kv_heads, head_dim, cosines, sines)
    return q, k, v


def _check_angles(cosines: torch.Tensor, sines: torch.Tensor, tokens: int, head_dim: int) -> None:
    shape = (tokens, head_dim // 2)
    require(
        cosines.shape == sines.shape == shape and cosines.is_contiguous() and sines.is_contiguous(),
        f"cosines have shape {tuple(cosines.shape)} and sines {tuple(sines.shape)}: give [T, D / 2] = {shape}, both "
        "contiguous",
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _turn(x.unsqueeze(2), out.unsqueeze(2), cosines, sines)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _turn(_rows(grad).unsqueeze(2), out.unsqueeze(2), cosines, sines, back=True)
        return out, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        num_kv_heads: int,
        head_dim: int,
        cosines: torch.Tensor | None,
        sines: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cosines, sines)
        ctx.shape, ctx.heads = mixed.shape, (num_kv_heads, head_dim)
        parts = _parts(mixed, num_kv_heads, head_dim)
        outputs = [torch.empty(part.shape, dtype=mixed.dtype, device=mixed.device) for part in parts]
        _turn(parts[0], outputs[0], cosines, sines)
        _turn(parts[1], outputs[1], cosines, sines)
        _turn(parts[2], outputs[2], None, None)
        return tuple(output.flatten(2, 3) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        kv_heads, _ = ctx.heads
        mixed = torch.empty(ctx.shape, dtype=grads[0].dtype, device=grads[0].device)
        parts = _parts(mixed, *ctx.heads)
        sources = [_rows(grad).unflatten(2, (kv_heads, -1)) for grad in grads]
        _turn(sources[0], parts[0], cosines, sines, back=True)
        _turn(sources[1], parts[1], cosines, sines, back=True)
        _turn(sources[2], parts[2], None, None)
        return mixed, None, None, None, None


def _rows(grad: torch.Tensor) -> torch.Tensor:
    """A gradient whose heads of a token lie together: other strides would depend on the length, and compile again."""
    return grad if grad.stride()[2:] == (grad.shape[3], 1) else grad.contiguous()


def _parts(mixed: torch.Tensor, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Views of a projection by KV head, [B, T, Hkv, G or 1, D]."""
    by_head = mixed.unflatten(2, (num_kv_heads, -1, head_dim)).transpose(0, 1)
    group = by_head.shape[3] - 2
    return by_head[:, :, :, :group], by_head[:, :, :, group : group + 1], by_head[:, :, :, group + 1 :]


def _turn(
    source: torch.Tensor,
    target: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    *,
    back: bool = False,
) -> None:
    """Write `source`, rotated, into `target`: views [B, T, N, M, D], contiguous in D. Without angles, copy it.

    back: rotate by the negative angles, which is the gradient of a rotation.
    """
    if _takes_triton(source):
        from dash_kernels.triton.rotary import turn

        turn(source, target, cosines, sines, back=back)
        return
    if cosines is None or sines is None:
        target.copy_(source)
        return
    dtype = accumulation_dtype(source.dtype)
    cos, sin = (angle.to(dtype)[:, None, None] for angle in (cosines, sines))  # [T, 1, 1, D / 2]
    if back:
        sin = -sin
    first, second = source.to(dtype).chunk(2, dim=-1)
    target_first, target_second = target.chunk(2, dim=-1)
    target_first.copy_(first * cos - second * sin)
    target_second.copy_(second * cos + first * sin)


def _takes_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
