"""What the ranks of the tests of saved states do.

The test process itself does not import this: it would load Megatron-core.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import FileSystemReader

from dash_dist.config.model import ModelConfig
from dash_dist.megatron import checkpoint
from dash_dist.megatron.engine import MegatronEngine
from tests.megatron.megatron_jobs import engine_of, train
from tests.support.models import STEPS_BEFORE_SAVE, Case

# Rows of odd lengths, which the equal parts of a flat buffer cut.
MODEL = ModelConfig(
    num_layers=2, hidden_size=36, ffn_hidden_size=50, num_attention_heads=4, num_kv_heads=2, head_dim=8, init_std=0.2
)
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "gather",
    "reduce",
    "scatter",
    "send",
)


@dataclass(frozen=True)
class Share:
    """One rank's part in a save.

    Attributes:
        state: bytes of what its optimizer works on.
        weights: bytes of the model's weights at this rank.
        written: bytes of its blocks in the checkpoint.
        exchanged: bytes that it gave to collectives until training went on.
        in_rows: blocks of the optimizer's state that begin within a row.
    """

    state: int
    weights: int
    written: int
    exchanged: int
    in_rows: int


def shares(cases: dict[str, Case], folder: Path) -> dict[str, Share]:
    """Save each case, which is not trained."""
    found = {}
    for name, case in cases.items():
        with engine_of(case, model=MODEL) as engine:
            with _exchanged() as exchanged:
                save: Any = engine.start_save(folder / name, background=True)
            items = save._plan.items
            save.finish()
            found[name] = Share(
                state=_state_bytes(engine),
                weights=sum(parameter.nbytes for parameter in engine.model.parameters()),
                written=sum(item.tensor_data.chunk.sizes.numel() * 4 for item in items),
                exchanged=sum(exchanged),
                in_rows=sum(item.index.fqn.startswith("optimizer") and item.index.offset[-1] > 0 for item in items),
            )
    return found


def train_and_save(cases: dict[str, Case], folder: Path) -> None:
    """Save each case in `folder`/name, trained by a few steps."""
    for name, case in cases.items():
        with engine_of(case, model=MODEL) as engine:
            train(engine, case, STEPS_BEFORE_SAVE)
            engine.start_save(folder / name, background=True).finish()


def load_and_save(steps: list[tuple[str, str, Case]], folder: Path) -> list[tuple[int, int]]:
    """Per step (from, to, case): load one checkpoint, and save it again as another.

    Returns the bytes of the optimizer's state that were read, and those that this rank has.
    """
    seen = []
    for source, target, case in steps:
        with engine_of(case, model=MODEL) as engine:
            with mock.patch.object(checkpoint, "_read", wraps=checkpoint._read) as read:
                engine.load(folder / source)
            ((_, wanted), _) = read.call_args
            seen.append((sum(block.data.nbytes for block in wanted), _state_bytes(engine)))
            engine.start_save(folder / target, background=True).finish()
    return seen


def load_where_a_rank_cannot_read(case: Case, folder: Path, rank: int) -> OSError | None:
    """Return the error of loading a checkpoint whose files rank `rank` alone cannot read."""
    with engine_of(case, model=MODEL) as engine, ExitStack() as stack:
        engine.start_save(folder, background=False).finish()
        if dist.get_rank() == rank:
            failure = OSError(errno.EIO, "Input/output error")
            stack.enter_context(mock.patch.object(FileSystemReader, "read_data", side_effect=failure))
        try:
            engine.load(folder)
        except OSError as error:
            return error
    return None


def _state_bytes(engine: MegatronEngine) -> int:
    """Bytes of float32 weights and moments, where a distributed optimizer has them; of moments alone elsewhere."""
    keys = 3 if engine._trained.identity["distributed_optimizer"] else 2
    return sum(
        keys * tensor.nbytes
        for part in engine._optimizer.megatron.chained_optimizers
        for state in part.optimizer.state.values()
        for name, tensor in state.items()
        if name == "exp_avg"
    )


@contextmanager
def _exchanged() -> Iterator[list[int]]:
    """Sizes of the tensors that collectives get within the block, in bytes."""
    sizes: list[int] = []

    def recorded(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            for argument in (*arguments, *options.values()):
                tensors = argument if isinstance(argument, list) else [argument]
                sizes.extend(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for module in (dist, distributed_c10d):
            for name in _COLLECTIVES:
                stack.enter_context(mock.patch.object(module, name, recorded(getattr(module, name))))
        yield sizes
