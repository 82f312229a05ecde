"""Attention whose forward pass runs once although the layer around it is recomputed.

The first pass makes the autograd nodes of the attention, which keep all that they need but for the inputs. The
recomputation brings the inputs back and takes the output as it is. Knows autograd's hooks on saved tensors; does not
know which attention it is, nor layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from dash_dist.context_parallel.recompute import ForwardMemory

Other = TypeVar("Other")
Attend = Callable[..., tuple[torch.Tensor, Other]]


def with_kept_output(
    memory: ForwardMemory[KeptOutput] | None, attend: Attend[Other], *inputs: torch.Tensor
) -> tuple[torch.Tensor, Other]:
    """Call `attend(*inputs)`; in the recomputation of a call, take what that one returned.

    Its output and what its autograd nodes save stay in memory from the first call to the backward pass. The inputs and
    views of them do not: the recomputation gives them anew.

    Args:
        memory: of the layer; None calls `attend` and keeps nothing.
        attend: returns an output that depends on the inputs, and anything that needs no gradient.

    Raises:
        RuntimeError: the recomputed inputs lie in memory in another way than the first ones.
    """
    if memory is None:
        return attend(*inputs)
    if torch.is_grad_enabled():
        kept = memory.recall()
        if kept is None:
            return attend(*inputs)
        out: torch.Tensor = _Resumed.apply(kept, *inputs)
        return out, kept.other
    kept = KeptOutput(attend, inputs)
    memory.remember(kept)
    return kept.out, kept.other


class KeptOutput:
    """A call of an attention that waits for its backward pass, without its inputs.

    Attributes:
        out: the output, without a gradient.
        other: what the attention returned beside it.
    """

    def __init__(self, attend: Attend[Any], inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = _Inputs(inputs)
        with torch.enable_grad(), saved_tensors_hooks(self._inputs.pack, self._inputs.unpack):
            entered = _Entered.apply(torch.empty(0, requires_grad=True), *inputs)
            out, self.other = attend(*entered)
        self._inputs.forget_addresses()
        self.out = out.detach()
        # Edges and not tensors: these would keep the inputs.
        self._root = get_gradient_edge(out)
        self._leaves = [get_gradient_edge(one) for one in entered]

    def gradients(self, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs, for once: the nodes free what they kept."""
        with self._inputs.given(inputs):
            return torch.autograd.grad(self._root, self._leaves, grad, allow_unused=True)

    def check(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Raise RuntimeError unless the inputs lie in memory as the first ones did."""
        self._inputs.check(inputs)


class _Entered(torch.autograd.Function):
    """Gives inputs a node, so that the attention makes its own; `root` requires a gradient."""

    @staticmethod
    def forward(ctx: Any, root: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one.detach() for one in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError("no gradient goes beyond the inputs of the attention")


class _Resumed(torch.autograd.Function):
    """Stands for the kept call, with recomputed inputs."""

    @staticmethod
    def forward(ctx: Any, kept: KeptOutput, *inputs: torch.Tensor) -> torch.Tensor:
        kept.check(inputs)
        ctx.kept = kept
        ctx.save_for_backward(*inputs)
        return kept.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.kept.gradients(ctx.saved_tensors, grad)


@dataclass(frozen=True)
class _Place:
    """Elements of an input, or of a view of inputs.

    index: the first input in the same storage. offset: elements from its first one.
    """

    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Inputs:
    """Inputs of a kept call: recognised where a node saves them, and given when it asks for them.

    The nodes refer to this, and this to no node, so that calls that are never repeated are freed.
    """

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self._places = _places(inputs)
        self._dtypes = [one.dtype for one in inputs]
        self._begins = [int(one.storage_offset()) for one in inputs]
        self._index_at = _index_at(inputs)
        self._given: tuple[torch.Tensor, ...] = ()

    def forget_addresses(self) -> None:
        """Recognise no input any more: its memory will be another tensor's."""
        self._index_at = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        index = self._index_at.get(tensor.untyped_storage().data_ptr())
        if index is None or tensor.dtype != self._dtypes[index]:
            return tensor
        return _Place(index, tensor.shape, tensor.stride(), int(tensor.storage_offset()) - self._begins[index])

    def unpack(self, saved: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        given = self._given[saved.index]
        return given.as_strided(saved.size, saved.stride, int(given.storage_offset()) + saved.offset)

    def check(self, inputs: tuple[torch.Tensor, ...]) -> None:
        places = _places(inputs)
        if places != self._places:
            raise RuntimeError(
                f"the attention's recomputed inputs lie in memory as {places}, those of its forward pass as "
                f"{self._places}: set parallel.recompute to full, and report this"
            )

    @contextlib.contextmanager
    def given(self, inputs: tuple[torch.Tensor, ...]) -> Iterator[None]:
        """Let nodes have these inputs within the block."""
        self._given = inputs
        try:
            yield
        finally:
            self._given = ()


def _index_at(inputs: tuple[torch.Tensor, ...]) -> dict[int, int]:
    """Address of each storage -> the first input in it."""
    found: dict[int, int] = {}
    for index, one in enumerate(inputs):
        found.setdefault(one.untyped_storage().data_ptr(), index)
    return found


def _places(inputs: tuple[torch.Tensor, ...]) -> list[_Place]:
    index_at = _index_at(inputs)
    places = []
    for one in inputs:
        index = index_at[one.untyped_storage().data_ptr()]
        offset = int(one.storage_offset()) - int(inputs[index].storage_offset())
        places.append(_Place(index, one.shape, one.stride(), offset))
    return places
