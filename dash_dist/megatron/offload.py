"""Activation offload: inputs of recomputed layers in host memory until the backward pass wants them.

Knows the order in which a stage's layers run, and the streams that copy. Does not know what a layer computes.

A copy runs on a stream of its own, beside the next layer of the forward pass, and beside the layer after it in the
backward pass. Device memory is allocated and freed in the order of the computing stream alone: that stream waits for
a copy to the host before the memory may be used again, and for a copy from the host before it is read.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from dash_dist.megatron.host_memory import HostPool


class ActivationOffload:
    """The inputs of some layers of a pipeline stage, kept on the host between their two passes.

    Args:
        decoder: runs its layers in order, the first of them under reentrant activation checkpointing.
        layers: of the stage, from 0, whose inputs go to the host.
        recomputed: layers under checkpointing; the others save what they please.
        hidden_size: channels of the inputs.
        device: of the layers. On a CPU the copies are plain ones.
    """

    def __init__(
        self,
        decoder: TransformerBlock,
        layers: Collection[int],
        *,
        recomputed: int,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        self.pool = HostPool(pinned=device.type == "cuda")
        self._layers = layers
        self._hidden_size = hidden_size
        self._copies = _Copies(device)
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        decoder.register_forward_pre_hook(self._begin)
        decoder.register_forward_hook(self._end, always_call=True)
        for layer in decoder.layers[recomputed : recomputed + 1]:
            layer.register_forward_pre_hook(self._end)

    def _begin(self, decoder: nn.Module, _inputs: Any) -> None:
        if not (torch.is_grad_enabled() and decoder.training):
            return
        self._latest: _Input | None = None
        self._number = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def _end(self, _module: nn.Module, *_tensors: Any) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__()
        self._hooks = self._latest = None
        self._copies.free_sent()

    def _pack(self, tensor: torch.Tensor) -> Any:
        """Take a tensor that autograd saves; inputs of layers are known by their shape, [s, b, hidden]."""
        if tensor.dim() != 3 or tensor.shape[-1] != self._hidden_size:
            return tensor
        self._copies.free_sent()
        number, self._number = self._number, self._number + 1
        if number in self._layers:
            self._latest = _HostInput(tensor, self.pool, self._copies, self._latest)
        else:
            self._latest = _DeviceInput(tensor, self._latest)
        return self._latest


class _Copies:
    """Copies on a side stream in order, and the device memory that they still read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        """Copy (source, destination) pairs once all that was launched so far is done; returns their end."""
        if self._stream is None:
            for source, destination in pairs:
                destination.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, destination in pairs:
                destination.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def send(self, tensor: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy `tensor` to the host by pairs, and hold it until `free_sent`."""
        self._sent.append((tensor, self.copy(pairs)))

    def free_sent(self) -> None:
        """Have the computing stream wait for the copies to the host, and let their device memory go."""
        for _, done in self._sent:
            self.wait(done)
        self._sent.clear()

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Have the computing stream wait for a copy."""
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)


class _Input:
    """The input of a layer between its passes. before: that of the layer that is recomputed next."""

    def __init__(self, before: _Input | None) -> None:
        self._before = before

    def prefetch(self) -> None:
        """Begin to bring the input back."""

    def take(self) -> torch.Tensor:
        """Return the input on its device, and begin to bring the next one back."""
        found = self._find()
        if self._before is not None:
            self._before.prefetch()
            self._before = None
        return found

    def _find(self) -> torch.Tensor:
        raise NotImplementedError


class _DeviceInput(_Input):
    def __init__(self, tensor: torch.Tensor, before: _Input | None) -> None:
        super().__init__(before)
        self._tensor = tensor

    def _find(self) -> torch.Tensor:
        return self._tensor


class _HostInput(_Input):
    """An input in blocks of a pool, which get them back with the last reference to this object.

    Blocks are copied on one stream in order: one that is given back may be written to at once.
    """

    def __init__(self, tensor: torch.Tensor, pool: HostPool, copies: _Copies, before: _Input | None) -> None:
        super().__init__(before)
        self._pool, self._copies = pool, copies
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._fetched: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None
        self._blocks: list[torch.Tensor] = []
        self._blocks = pool.take(tensor.nbytes)
        flat = tensor.contiguous()
        copies.send(flat, list(zip(_cut(flat, self._blocks), self._blocks_of(flat), strict=True)))

    def __del__(self) -> None:
        if self._fetched is not None and self._done is not None:
            self._done.synchronize()  # it is being written to, and nobody has waited: the step has failed
        self._pool.give_back(self._blocks)

    def prefetch(self) -> None:
        if self._fetched is None:
            self._fetched = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            pieces = _cut(self._fetched, self._blocks)
            self._done = self._copies.copy(list(zip(self._blocks_of(self._fetched), pieces, strict=True)))

    def _find(self) -> torch.Tensor:
        self.prefetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        self._copies.wait(self._done)
        return fetched

    def _blocks_of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of the blocks that hold the bytes of `tensor`."""
        pieces = _cut(tensor, self._blocks)
        return [block[: piece.numel()] for block, piece in zip(self._blocks, pieces, strict=True)]


def _unpack(packed: Any) -> torch.Tensor:
    found: torch.Tensor = packed.take() if isinstance(packed, _Input) else packed
    return found


def _cut(tensor: torch.Tensor, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cut the bytes of a contiguous tensor into views as long as the blocks; the last may be shorter."""
    return list(tensor.view(-1).view(torch.uint8).split(blocks[0].numel()))
