"""The storm: an undisturbed run, the same run under consecutive faults, and the comparison.

Knows the order of events; does not know the reaction to each fault (`trial.py`) or the comparison (`compare.py`).
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dash_dist.config.file import load_config
from dash_dist.data.stream import build_data_stream
from dash_dist.data.tokenizer import load_tokenizer
from tests.storm.cluster import LocalCluster
from tests.storm.compare import Difference, compare_losses, compare_weights
from tests.storm.errors import StormError
from tests.storm.gpus import GpuMemory
from tests.storm.processes import Family, tree
from tests.storm.rank_hook.sitecustomize import crc
from tests.storm.run import ROOT, Patience, RunFiles, finish_run, start_run, tail, write_run
from tests.storm.schedule import FAULT_KINDS, FaultKind, Schedule, draw_schedule
from tests.storm.trial import DRAIN_SECONDS, Outcome, Trial
from tests.storm.watch import RunWatch

# The run needs two. The ranks of a lost node move to the spare one, and the next spare joins meanwhile.
CPU_NODES = 3

# Time for a run's processes to end while the cluster continues.
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Result:
    """Result of a storm that the run survived."""

    seed: int
    workers: int
    gpus: int
    steps: int
    interval: int
    outcomes: list[Outcome]
    events: dict[str, int]
    losses: Difference
    weights: Difference
    storm_seconds: float


class Storm:
    """A storm of `faults` faults drawn from `seed`, with all its files in `folder`.

    Args:
        workers: ranks, 2 (CP=2) or 4 (CP=2 x DP=2); half of them on each of two nodes, or one on each GPU.
        step_seconds: minimum time of a step, so that a fault can hit it in the middle.
        interval: steps between checkpoints.
        fault_seconds: longest time to recover from a fault before the storm ends.
        say: receives progress messages.
        kinds: of the faults; all if `faults` allows it.
        gpus: GPUs of this machine, each that of a node: `workers`, or 0 for a run on CPUs. A lost node has no spare,
            and the one that replaces it takes its GPU.
        answer_seconds: time without an answer after which a rank counts as lost; None to measure this machine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        faults: int,
        seed: int,
        workers: int,
        step_seconds: float,
        interval: int,
        fault_seconds: float,
        say: Callable[[str], None],
        kinds: Sequence[FaultKind] = FAULT_KINDS,
        gpus: int = 0,
        answer_seconds: int | None = None,
    ) -> None:
        self.schedule: Schedule = draw_schedule(
            faults=faults,
            seed=seed,
            interval=interval,
            drain_steps=math.ceil(DRAIN_SECONDS / max(step_seconds, 0.05)),
            kinds=kinds,
        )
        self._folder = folder
        self._hook = folder / "ranks.json"
        self._seed = seed
        self._workers = workers
        self._gpus = gpus
        self._answer_seconds = answer_seconds
        self._step_seconds = step_seconds
        self._interval = interval
        self._fault_seconds = fault_seconds
        self._say = say
        self._begun = time.monotonic()

    def run(self) -> Result:
        """Run the storm and return its result. Raises StormError."""
        family = Family()
        memory = GpuMemory(self._gpus)
        with family, LocalCluster(self._folder, environment=node_environment(self._hook)) as cluster:
            for cpus, gpu in node_sizes(self._workers, self._gpus):
                cluster.add_node(cpus=cpus, gpu=gpu)
            self._note(f"a head and {len(cluster.nodes) - 1} nodes are up")
            undisturbed, patience = self._undisturbed(cluster)
            begun = time.monotonic()
            watch, outcomes = self._disturbed(cluster, patience, memory)
            storm_seconds = time.monotonic() - begun
        if family.strays:
            raise StormError("processes were left over:\n" + "\n".join(family.strays))
        memory.check_free(seconds=_END_SECONDS)
        events = Counter[str](event.kind for event in watch.events())
        drawn = {kind: count for kind, count in watch.drawn_events().items() if count}
        if drawn != events:
            raise StormError(f"TensorBoard shows other faults than happened: {drawn}, and not {dict(events)}")
        result = Result(
            seed=self._seed,
            workers=self._workers,
            gpus=self._gpus,
            steps=self.schedule.steps,
            interval=self._interval,
            outcomes=outcomes,
            events=dict(events),
            losses=compare_losses(undisturbed.losses(), watch.losses()),
            weights=compare_weights(undisturbed.checkpoints()[-1], watch.checkpoints()[-1]),
            storm_seconds=storm_seconds,
        )
        for what, difference in (("losses", result.losses), ("weights", result.weights)):
            if not difference.exact:
                raise StormError(f"the {what} are not those of the undisturbed run: {difference}")
        return result

    def _undisturbed(self, cluster: LocalCluster) -> tuple[RunWatch, Patience]:
        """Run without faults, and return the run with timeouts that suit this machine."""
        patience = Patience(answer=int(self._fault_seconds))
        files, watch = self._prepare("undisturbed", patience, step_seconds=0.0)
        started = time.time()
        driver = start_run(cluster, files, patience, workers=self._workers)
        finish_run(driver, files, seconds=self._fault_seconds + 2 * self.schedule.steps)
        watch.wait_until_ended(seconds=_END_SECONDS)
        first = min(one.time for one in watch.steps) - started
        self._note(
            f"undisturbed: {self.schedule.steps} steps in {time.time() - started:.0f} s, the first after {first:.0f} s"
        )
        return watch, Patience(self._answer_seconds) if self._answer_seconds else Patience.after_start_of(first)

    def _disturbed(
        self, cluster: LocalCluster, patience: Patience, memory: GpuMemory
    ) -> tuple[RunWatch, list[Outcome]]:
        files, watch = self._prepare("storm", patience, step_seconds=self._step_seconds)
        chance = random.Random(f"{self._seed} faults")
        outcomes = []

        def start() -> subprocess.Popen[bytes]:
            return start_run(cluster, files, patience, workers=self._workers)

        def processes_of_run() -> set[int]:
            return {process.pid for rank in watch.ranks().values() for process in tree(rank)}

        driver = start()
        try:
            for fault in self.schedule.faults:
                trial = Trial(
                    fault,
                    cluster,
                    driver,
                    watch,
                    chance,
                    start=start,
                    interval=self._interval,
                    seconds=self._fault_seconds,
                    end_seconds=patience.end,
                )
                outcome = trial.run()
                driver = trial.driver
                memory.check_holders(processes_of_run, seconds=_END_SECONDS)
                outcomes.append(outcome)
                self._note(
                    f"{outcome.number:3} {outcome.kind} at step {outcome.step}: {outcome.what}; "
                    f"lost {outcome.lost_steps} steps, recovered in {outcome.recovery_seconds:.1f} s"
                )
            finish_run(driver, files, seconds=self._fault_seconds + 5 * self._interval * self._step_seconds)
            watch.wait_until_ended(seconds=_END_SECONDS)
        except Exception as error:  # whatever it was: this is the time to see the state of the run
            raise StormError(f"{type(error).__name__}: {error}\n{_state(files, watch)}") from error
        return watch, outcomes

    def _prepare(self, name: str, patience: Patience, *, step_seconds: float) -> tuple[RunFiles, RunWatch]:
        """The files of a run, and what the ranks will read of the storm."""
        files = write_run(self._folder, name, steps=self.schedule.steps, interval=self._interval, patience=patience)
        ranks = self._folder / f"{name}_ranks"
        ranks.mkdir()
        settings = {"folder": str(ranks), "step_seconds": step_seconds, "poisoned": self._poison(files)}
        self._hook.write_text(json.dumps(settings))
        return files, RunWatch(ranks, files.directory)

    def _poison(self, files: RunFiles) -> list[int]:
        """Return the CRC-32 of one sequence for each step whose loss must not be finite."""
        config = load_config(files.config)
        tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
        stream = build_data_stream(
            config.data,
            tokenizer=tokenizer,
            sequence_length=config.training.sequence_length,
            chunk_size=config.attention.chunk_size,
            global_batch_size=config.training.global_batch_size,
            dp_rank=0,
            dp_size=1,
            micro_batch_size=config.training.global_batch_size,
        )
        chance = random.Random(f"{self._seed} poison")
        poisoned = []
        for step in range(1, config.training.steps + 1):
            (batch,) = stream.next_step()
            if step in self.schedule.nan_steps:
                poisoned.append(crc(chance.choice(list(batch.tokens))))
        return poisoned

    def _note(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._begun:6.0f} s  {text}")


def node_sizes(workers: int, gpus: int) -> list[tuple[int, int | None]]:
    """Return the CPUs of each node and the number of its GPU, None without one."""
    return [(1, gpu) for gpu in range(gpus)] or [(workers // 2, None)] * CPU_NODES


def node_environment(hook: Path) -> dict[str, str]:
    """Return the environment of nodes and of their ranks, whose steps follow the settings in the file `hook`.

    It hides all GPUs; a node with a GPU has its own value of that variable. Packages on this process's PYTHONPATH stay
    visible: those may be all there are of Ray and Megatron-core.
    """
    path = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent / "rank_hook")]
    if inherited := os.environ.get("PYTHONPATH"):
        path.append(inherited)
    return {
        "DASH_STORM": str(hook),
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _state(files: RunFiles, watch: RunWatch) -> str:
    """Describe a run that did not recover, for diagnosis."""
    events = "\n".join(str(event) for event in watch.events())
    parts = {
        "the driver": tail(files.log),
        "events": events,
        "ranks": f"{watch.ranks()}, at step {watch.step}, checkpoints of steps {watch.saved_steps()}",
        "stacks of the ranks": watch.stacks(),
    }
    return "\n".join(f"--- {title}\n{text}" for title, text in parts.items())
