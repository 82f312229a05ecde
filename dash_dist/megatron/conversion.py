"""The conversion phase: dense layers, whose routing learns to give their output.

Every layer computes its dense output, which goes on, and the output of DashAttention on the same queries, keys and
values. The difference is a loss of the layer alone, whose gradient reaches `summary_query` and nothing else. Knows one
layer's tensors and how Megatron-core collects gradients. Does not know the model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from dash_dist.context_parallel import DashAttention, dash_attention
from dash_dist.context_parallel.dense import dense_attention_one_device, dense_spec
from dash_kernels import ChunkGrid

_SMALLEST = 1e-12  # of a squared norm that divides


class Conversion:
    """The local loss of one layer, on one rank's heads and shard.

    Args:
        attention: owns `summary_query`.
        heads: query heads of the whole layer.

    Attributes:
        weight: factor of a token's gradient; set before a step.
    """

    def __init__(self, attention: DashAttention, heads: int) -> None:
        self._attention = attention
        self._heads = heads
        self._total: torch.Tensor | None = None
        self.weight = 1.0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: ChunkGrid | None, *, training: bool
    ) -> torch.Tensor:
        """Return the dense output [B, T, Hq, D], and leave the gradient of the local loss in `summary_query`.

        Nothing of the model lies between the loss and its parameter, so its backward pass runs at once, and the model
        needs none. A recomputation in a backward pass repeats the dense output alone.

        Args:
            q, k, v: as for `DashAttention`.
            training: otherwise there is no local loss.
        """
        dense = self._dense(q, k, v, chunks)
        in_backward_pass = torch._C._current_graph_task_id() != -1
        if training and not in_backward_pass:
            with torch.enable_grad():
                found = self._attention(q.detach(), k.detach(), v.detach(), chunks=chunks)
                loss = output_loss(found, dense.detach()).sum() / self._heads
                (loss * self.weight).backward()
            self._total = loss.detach() if self._total is None else self._total + loss.detach()
        return dense

    def take_total(self) -> float:
        """Return the sum over this rank's tokens and heads since the last call, divided by `heads`."""
        total, self._total = self._total, None
        return 0.0 if total is None else float(total)

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: ChunkGrid | None) -> torch.Tensor:
        layer = self._attention
        spec = dense_spec(chunk_size=layer.spec.chunk_size, softmax_scale=layer.spec.softmax_scale)
        summary_query = layer.summary_query.detach()
        if layer.cp_group is None and chunks is None:
            return dense_attention_one_device(q, k, v, summary_query, spec.for_head_dim(q.shape[-1]))
        out: torch.Tensor = dash_attention(
            q,
            k,
            v,
            summary_query,
            spec=spec,
            chunks=chunks,
            backend=layer.backend,
            cp_group=layer.cp_group,
            layout=layer.layout,
            exchange=layer.exchange,
            ranks_per_node=layer.ranks_per_node,
        )
        return out


def output_loss(found: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Squared distance from the dense output, relative to its squared norm.

    Args:
        found, dense: [..., D].

    Returns:
        [...], float32 or float64.
    """
    found, dense = (x if x.dtype == torch.float64 else x.float() for x in (found, dense))
    scale = dense.square().sum(dim=-1).clamp_min(_SMALLEST)
    return (found - dense).square().sum(dim=-1) / scale


def mean_loss(layers: Iterable[Conversion], *, positions: int, num_layers: int, device: torch.device) -> float:
    """Return the mean local loss of a step over tokens, heads and layers. A collective: all ranks call it.

    Args:
        layers: of this rank's stage.
        positions: tokens of the global batch, padding included.
        num_layers: that convert, of the whole model.
    """
    total = torch.tensor(sum(layer.take_total() for layer in layers), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / (positions * num_layers)


def check_trained(names: Iterable[str]) -> None:
    """Refuse, with ValueError, a conversion phase that would train more than `summary_query`.

    Args:
        names: of the trained parameters.
    """
    if others := [name for name in names if not name.endswith(".summary_query")]:
        raise ValueError(
            f"attention.conversion trains summary_query alone, and {others[0]} would get no gradient: set "
            'trainable.parameters to [{match: "*.summary_query"}], without trainable.lora'
        )
