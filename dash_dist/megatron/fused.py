"""Norms, SwiGLU and the loss of a training step, in fused kernels on GPUs and in PyTorch elsewhere.

The kernels are Liger's (https://github.com/linkedin/Liger-Kernel). Knows their calls; does not know layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from dash_kernels.ranges import ranged

_IGNORED = -100
"""A target without a loss."""


def norm_module(fused: bool) -> Any:
    """RMSNorm as a layer's specification names it."""
    if not fused:
        return TorchRMSNorm
    from liger_kernel.megatron import LigerMegatronRMSNorm

    return LigerMegatronRMSNorm


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm in PyTorch, with the arguments by which Megatron-core makes a norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        # Megatron-core sums such gradients over tensor parallelism, whose ranks norm different tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SwiGLU(MegatronModule):
    """silu(gate) * up of an input [..., 2 x ffn], gate before up; Megatron-core's MLP takes it as its activation.

    Keeps its input alone for the backward pass.
    """

    def __init__(self, config: TransformerConfig, *, fused: bool) -> None:
        super().__init__(config=config)
        self.fused = fused

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        if not self.fused:
            product: torch.Tensor = _SwiGLU.apply(gate_and_up)
            return product
        from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

        rows = gate_and_up.flatten(0, -2)
        product = LigerFusedGateUpSiLUMulFunction.apply(rows)
        return product.view(*gate_and_up.shape[:-1], -1)


class _SwiGLU(torch.autograd.Function):
    """In PyTorch. Autograd's own would keep silu(gate), and gate and up once more."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)


@ranged("loss")
def fused_summed_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss_mask: torch.Tensor
) -> torch.Tensor:
    """Output layer and summed cross entropy, with their gradients computed piece by piece in the forward pass.

    Neither all logits nor float32 ones are ever held, and the output layer is multiplied three times, not four.

    Args:
        hidden: [s, b, hidden], which requires a gradient.
        weight: [tokens, hidden], rows of the output layer that stand for a token.
        targets: [b, s] int64.
        loss_mask: [b, s], True where the loss counts.

    Returns:
        A scalar, float32. Its gradient may be multiplied by a number afterwards.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    counted = targets.masked_fill(~loss_mask, _IGNORED).transpose(0, 1).flatten()
    total, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden.flatten(0, 1),
        weight,
        counted,
        None,  # bias
        None,  # weights of classes
        _IGNORED,
        0.0,  # z-loss
        0.0,  # label smoothing
        "sum",
        None,  # soft cap
        False,  # return the z-loss
        torch.float32,  # of the sum of the weight's gradients
    )
    return total


def fused_token_losses(logits: torch.Tensor, targets: torch.Tensor, tp_group: Any) -> torch.Tensor:
    """Cross entropy of logits [s, b, vocab / tp] that tensor-parallel ranks hold parts of; [b, s] float32.

    Args:
        targets: [b, s] int64, of the whole vocabulary.
    """
    from liger_kernel.ops import LigerVocabParallelCEFunction

    losses: torch.Tensor = LigerVocabParallelCEFunction.apply(
        logits, targets.transpose(0, 1).contiguous(), tp_group, _IGNORED, 0.0, "megatron", "partition"
    )
    return losses.transpose(0, 1)
