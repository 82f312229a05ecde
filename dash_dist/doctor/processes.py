"""Functions called in processes of their own: together, within a time limit, and with nothing left behind.

Knows processes; does not know what they do. What a call and the libraries below it print goes to a file, whose end is
part of the error if the call fails.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

_PRELOADED = ["torch", "dash_dist.context_parallel", "dash_dist.doctor.checks"]
_SHOWN_LINES = 4


class ProcessFailure(Exception):
    """A call raised, its process died, or its time was over."""


@functools.cache
def _context() -> Any:
    # Forked from a server that has imported PyTorch, a process is there at once. The server makes no call of CUDA,
    # which would not survive the fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def call_in_processes(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, time_limit: float
) -> list[Any]:
    """`function(*arguments)` for each of `calls`, each in a process of its own, all at the same time.

    Args:
        function: a module's function.
        calls: the arguments, by process.
        time_limit: for all, in seconds.

    Returns what each call returned. Raises ProcessFailure for the first that fails, and ends the others.
    """
    context = _context()
    pipes = [context.Pipe(duplex=False) for _ in calls]
    with tempfile.TemporaryDirectory(prefix="dash-dist-doctor-", ignore_cleanup_errors=True) as folder:
        outputs = [Path(folder) / f"output_{index}" for index in range(len(calls))]
        processes = [
            context.Process(target=_called, args=(sender, str(output), function, arguments))
            for (_, sender), output, arguments in zip(pipes, outputs, calls, strict=True)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            return _results([receiver for receiver, _ in pipes], processes, outputs, time_limit)
        finally:
            for process in processes:
                _end(process)
            for receiver, _ in pipes:
                receiver.close()


def _results(receivers: list[Connection], processes: list[Any], outputs: list[Path], time_limit: float) -> list[Any]:
    deadline = time.monotonic() + time_limit
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting: dict[Any, int] = {one: index for index, one in enumerate(receivers) if index not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(waiting.values())
            of = f" (processes {late} of {len(receivers)})" if len(receivers) > 1 else ""
            raise ProcessFailure(f"no answer within {time_limit:g} s{of}{_end_of(outputs[late[0]])}")
        for one in ready:
            index = waiting[one]
            try:
                error, results[index] = pickle.loads(receivers[index].recv_bytes())
            except EOFError:
                processes[index].join(5)
                raise ProcessFailure(
                    f"the process died with status {processes[index].exitcode}{_end_of(outputs[index])}"
                ) from None
            if error is not None:
                raise ProcessFailure(error)
    return [results[index] for index in range(len(receivers))]


def describe(error: Exception) -> str:
    """Its kind, its first lines, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    lines = [line for line in str(error).splitlines() if line.strip()][:_SHOWN_LINES]
    return f"{type(error).__name__}: {' '.join(lines)[:500]} ({Path(place.filename).name} line {place.lineno})"


def _called(sender: Connection, output: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    message: tuple[str | None, Any]
    try:
        message = None, function(*arguments)
    except Exception as error:  # whatever a broken machine makes a library raise is what was to be found
        message = describe(error), None
    sender.send_bytes(pickle.dumps(message))
    sender.close()


def _end(process: Any) -> None:
    """End a process and those that it started; one that is done ends by itself."""
    if process.pid is None:
        return
    if process.exitcode is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
            if process.is_alive():
                process.join(0.5)  # a call that has answered is about to leave
            for one in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    if process.is_alive():
        process.kill()
    process.join(10)


def _end_of(output: Path) -> str:
    try:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return "".join(f"\n  | {line[:200]}" for line in lines[-_SHOWN_LINES:])
