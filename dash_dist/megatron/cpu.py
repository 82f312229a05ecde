"""The shims that let Megatron-core run with gloo on a machine without CUDA.

Knows which of Megatron-core's calls name CUDA. Nothing here runs where CUDA is available, and nothing outside
`megatron.core` sees a changed torch: the modules listed below get their own view of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

_PATCHED_MODULES = (
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
_CPU = torch.device("cpu")


def run_megatron_on_cpu() -> None:
    """Make Megatron-core's training path run on the CPU; nothing happens where CUDA is available, or again.

    What is covered, and why:

    - `torch.cuda.current_device()` is the CPU: buffers of gradients, pipeline messages and gathered shards of the
      sequence, the optimizer's state and the checkpoint's error flag are allocated there. `device="cuda"`
      likewise, in the token counter of the pipeline schedules and the optimizers' scale.
    - `torch.cuda.synchronize()` does nothing, in pipeline messages and the checkpoint writer, and
      `torch.cuda.current_stream()` is None, in the reduction of gradients: the CPU has no queue.
    - The CUDA random state (`get_rng_state`, `manual_seed`, and Megatron's own get and set) is a constant:
      nothing draws from it, since weights are initialised by `weights.initialise_weights` and there is no
      dropout; full activation recomputation saves and restores it all the same.
    - Parameters answer `.type()` with the CUDA type's name, and `.cuda()` with themselves, for as long as one
      of the functions in which Megatron-core asks runs: the distributed optimizer's constructor, and the copy
      of tied embeddings to the last pipeline stage.
    """
    if torch.cuda.is_available():
        return
    modules: list[Any] = [importlib.import_module(name) for name in _PATCHED_MODULES]
    if isinstance(modules[0].torch, _TorchOnCpu):
        return
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    view = _TorchOnCpu()
    for module in modules:
        module.torch = view
    random._get_cuda_rng_state = _constant_rng_state
    random._set_cuda_rng_state = _ignore

    DistributedOptimizer.__init__ = _seen_as_cuda(DistributedOptimizer.__init__)
    setup = LanguageModule.setup_embeddings_and_output_layer
    LanguageModule.setup_embeddings_and_output_layer = _seen_as_cuda(setup)


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    return None


def _constant_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


class _TorchOnCpu:
    """torch, except that its CUDA device is the CPU. Every other attribute is torch's own."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            **{
                **vars(torch.cuda),
                "current_device": lambda: _CPU,
                "current_stream": _ignore,
                "synchronize": _ignore,
                "manual_seed": _ignore,
                "get_rng_state": _constant_rng_state,
                "set_rng_state": _ignore,
            }
        )
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(device, str) and device.startswith("cuda"):
            device = _CPU
        return factory(*args, device=device, **kwargs)

    return create


@contextlib.contextmanager
def _tensors_look_like_cuda() -> Iterator[None]:
    tensor_class: Any = torch.Tensor
    type_of, cuda = tensor_class.type, tensor_class.cuda

    def type_seen(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(tensor, dtype, **kwargs)
        return type_of(tensor).replace("torch.", "torch.cuda.")

    tensor_class.type = type_seen
    tensor_class.cuda = lambda tensor, *_args, **_kwargs: tensor
    try:
        yield
    finally:
        tensor_class.type, tensor_class.cuda = type_of, cuda


def _seen_as_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _tensors_look_like_cuda():
            return function(*args, **kwargs)

    return call
