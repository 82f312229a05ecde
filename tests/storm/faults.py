"""Injection of each fault from outside the run's processes.

Knows how a fault is made; does not know when (`schedule.py` does). Each function makes one fault and returns its
description. The run must have ranks. A fault inside a part of a step is a request to the rank's hook.
"""

from __future__ import annotations

import random
import resource
import signal
from pathlib import Path

import psutil

from tests.storm.cluster import LocalCluster, Node
from tests.storm.processes import alive, tree
from tests.storm.requests import Failure, Part
from tests.storm.watch import RunWatch

# Writes beyond this size fail while the disk is "full". It lies between the sizes of curve files and checkpoint files.
FULL_DISK_BYTES = 256 << 10


def kill_worker(watch: RunWatch, chance: random.Random) -> str:
    rank, process = _any_rank(watch, chance)
    process.kill()
    return f"SIGKILL to rank {rank}"


def kill_first_rank(watch: RunWatch) -> str:
    watch.ranks()[0].kill()
    return "SIGKILL to rank 0"


def stop_rank(watch: RunWatch, chance: random.Random) -> str:
    rank, process = _any_rank(watch, chance)
    process.send_signal(signal.SIGSTOP)
    return f"SIGSTOP to rank {rank}"


def fail_in_part(watch: RunWatch, chance: random.Random, part: Part, failure: Failure) -> str:
    """Ask a random rank to fail in a part of a step; `watch.requests` knows when it has."""
    rank, _ = _any_rank(watch, chance)
    watch.requests.ask(rank, part, failure)
    return f"{'SIGKILL to' if failure == 'killed' else 'out of memory at'} rank {rank} in its {part}"


def choose_node(cluster: LocalCluster, watch: RunWatch, chance: random.Random) -> Node:
    """Return a random node that holds ranks."""
    ranks = {process.pid for process in watch.ranks().values()}
    return chance.choice([node for node in cluster.nodes if any(one.pid in ranks for one in node.processes())])


class FullDisk:
    """Limit on file sizes of the ranks and their children, whose larger writes fail with EFBIG until `end`."""

    def __init__(self, watch: RunWatch) -> None:
        self._watch = watch

    def begin(self) -> str:
        self._limit(FULL_DISK_BYTES)
        return f"no rank can write more than {FULL_DISK_BYTES >> 10} KiB to a file"

    def end(self) -> None:
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        for rank in self._watch.ranks().values():
            for process in tree(rank):
                try:
                    process.rlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                except psutil.NoSuchProcess:
                    continue


def damage_checkpoint(folder: Path, chance: random.Random) -> str:
    """Cut off the end of a random file of the checkpoint, or flip one of its bits."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    name, size = path.relative_to(folder.parent), path.stat().st_size
    position = chance.randrange(size)
    with path.open("r+b") as file:
        if chance.random() < 0.5:
            file.truncate(position)
            return f"{name} cut from {size} to {position} bytes"
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))
        return f"a bit of byte {position} of {name} flipped"


def _any_rank(watch: RunWatch, chance: random.Random) -> tuple[int, psutil.Process]:
    ranks = watch.ranks()
    rank = chance.choice([rank for rank, process in sorted(ranks.items()) if alive(process)])
    return rank, ranks[rank]
