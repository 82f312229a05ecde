"""Hook of the storm inside the ranks, loaded by PYTHONPATH in every Python process of the cluster.

Knows the engine, whose `train_step` it wraps on import; does not know the run, which has no code for the hook. Steps
take a minimum time, poisoned sequences turn the loss into NaN, and every step is recorded with its loss.

    $DASH_STORM       a file: {"folder": F, "step_seconds": ..., "poisoned": [CRC-32 of the tokens of a sequence, ...]}
    F/PID.jsonl       {"rank", "world_size", "step", "loss", "skipped", "time"} of every step done
    F/PID.stacks      stacks of all threads, written at SIGUSR2
"""

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


class _EngineFinder(importlib.abc.MetaPathFinder):
    """Finds the engine's module, and wraps its class once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _ENGINE:
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
        _wrap(module.MegatronEngine)


def _wrap(engine_class: Any) -> None:
    settings = json.loads(Path(os.environ["DASH_STORM"]).read_text())
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
    sys.meta_path.insert(0, _EngineFinder())
