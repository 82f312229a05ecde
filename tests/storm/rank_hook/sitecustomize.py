"""Hook of the storm inside the ranks, loaded by PYTHONPATH in every Python process of the cluster.

Knows the functions of `dash_dist` that it wraps on import; does not know the run, which has no code for the hook. Steps
take a minimum time, poisoned sequences turn the loss into NaN, and every step is recorded with its loss. A rank that
the storm names fails inside a part of a step.

    $DASH_STORM       a file: {"folder": F, "step_seconds": ..., "poisoned": [CRC-32 of the tokens of a sequence, ...]}
    F/PID.jsonl       {"rank", "world_size", "step", "loss", "skipped", "time"} of every step done
    F/PID.stacks      stacks of all threads, written at SIGUSR2
    F/request.json    {"rank", "part": a key of PARTS, "failure": "killed" or "out_of_memory"}; removed by that rank
    F/obeyed.json     {"time"} of its failure
"""

import contextlib
import faulthandler
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

_ENGINE = "dash_dist.megatron.engine"

PARTS = {
    "forward": ("dash_dist.megatron.core_attention", "DashCoreAttention", "forward"),
    "backward": ("dash_dist.megatron.core_attention", "DashCoreAttention", "forward"),  # hooks its output's gradient
    "exchange": ("dash_dist.context_parallel.transfer", "Transfer", "wait"),  # its first collective is on its way
    "optimizer": ("dash_dist.megatron.optimizer", "Optimizer", "update"),  # other ranks may have new weights already
    "save": ("dash_dist.megatron.write_plan", "_ChecksummedFile", "checksum"),  # the file is not on disk yet
}
"""Parts of a step, and the module, class and method in which a rank fails."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules with functions to wrap, and wraps those once a module is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _ENGINE and name not in {module for module, *_ in PARTS.values()}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappingLoader(spec.loader)
        return spec


class _WrappingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        settings = json.loads(Path(os.environ["DASH_STORM"]).read_text())
        if module.__name__ == _ENGINE:
            _wrap_step(module.MegatronEngine, settings)
        for part, (name, owner, method) in PARTS.items():
            if module.__name__ == name:
                wrap_part(part, getattr(module, owner), method, Path(settings["folder"]))


def wrap_part(part: str, owner: type, method: str, folder: Path) -> None:
    """Let `owner.method` fail where the request in `folder` names this rank and the part."""
    real = getattr(owner, method)
    rank_process = os.getpid()  # a checkpoint may be written by a forked copy of the rank

    @functools.wraps(real)
    def call(*arguments: Any, **options: Any) -> Any:
        if not _is_asked(folder, part):
            return real(*arguments, **options)
        if part != "backward":
            _obey(folder, rank_process)
            return real(*arguments, **options)
        result = real(*arguments, **options)
        result.register_hook(lambda gradient: _obey(folder, rank_process))
        return result

    setattr(owner, method, call)


def _is_asked(folder: Path, part: str) -> bool:
    try:
        request = json.loads((folder / "request.json").read_text())
    except FileNotFoundError:
        return False
    return request["part"] == part and str(request["rank"]) == os.environ.get("RANK")


def _obey(folder: Path, rank_process: int) -> None:
    """Fail as requested, unless the request has been obeyed meanwhile."""
    taken = folder / "request.taken"
    with contextlib.suppress(FileNotFoundError):
        (folder / "request.json").rename(taken)
        request = json.loads(taken.read_text())
        taken.write_text(json.dumps({"time": time.time()}))
        taken.rename(folder / "obeyed.json")
        if request["failure"] == "out_of_memory":
            import torch

            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.50 GiB in {request['part']}.")
        os.kill(rank_process, signal.SIGKILL)
        signal.pause()  # a forked copy waits for its own end, which follows


def _wrap_step(engine_class: Any, settings: dict[str, Any]) -> None:
    poisoned = frozenset(settings["poisoned"])
    train_step = engine_class.train_step

    @functools.wraps(train_step)
    def storm_step(engine: Any, micro_batches: Any) -> Any:
        log = _log(Path(settings["folder"]))
        begin = time.monotonic()
        hook = None
        if any(crc(row) in poisoned for batch in micro_batches for row in batch.tokens):
            hook = engine.model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        try:
            result = train_step(engine, micro_batches)
        finally:
            if hook is not None:
                hook.remove()
        time.sleep(max(0.0, settings["step_seconds"] - (time.monotonic() - begin)))
        record = {
            "rank": engine.dims.rank,
            "world_size": engine.dims.world_size,
            "step": engine.step,
            "loss": result.loss,
            "skipped": result.skipped,
            "time": time.time(),
        }
        log.write(json.dumps(record) + "\n")
        return result

    engine_class.train_step = storm_step


@functools.cache
def _log(folder: Path) -> TextIO:
    stacks = (folder / f"{os.getpid()}.stacks").open("w")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    return (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)


def crc(tokens: Any) -> int:
    """Return the CRC-32 of a sequence of token ids, as 64-bit numbers."""
    return zlib.crc32(tokens.to("cpu", copy=True).long().numpy().tobytes())


if "DASH_STORM" in os.environ:
    sys.meta_path.insert(0, _Finder())
