"""Workers of one attempt: placed, watched and ended as a group.

Knows Ray's placement groups and actors, and when a worker counts as lost; does not know what an attempt computes nor
what follows it.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NoReturn

from dash_dist.cluster.processes import signal_all, wait_until_gone
from dash_dist.cluster.rank import Job, Place, ProgressMessage, RankEnv, RankProcess, RankResult
from dash_dist.errors import RankError
from dash_dist.run.requests import Command

# How often a rank other than the first is asked whether it is there, in seconds.
_HEARTBEAT_SECONDS = 5.0

# When one rank has failed, the others fail within moments, and which one was first is not known: wait that long for
# the rest.
_AFTERMATH_SECONDS = 5.0


class AttemptFailed(Exception):
    """The workers cannot be placed or started, or some are lost; a new attempt may succeed."""


class NodeLost(AttemptFailed):
    """A node went away while places for workers were looked for: none of them has started."""


class WorkerGroup:
    """`num_workers` rank processes on the cluster, started by the constructor and ended by `end`.

    Args:
        num_workers: ranks.
        worker: resources that each takes.
        start_seconds: limit for each part of the start: finding places, starting the processes, meeting each other.
        answer_seconds: a process that has not answered for this long is lost: stopped, or on an unreachable node.
        keep_waiting: called about every second while places are looked for; what it raises ends the start.

    Raises AttemptFailed, with nothing left behind.
    """

    def __init__(
        self,
        num_workers: int,
        worker: Mapping[str, float],
        *,
        start_seconds: float,
        answer_seconds: float,
        keep_waiting: Callable[[], None],
    ) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._start_seconds = start_seconds
        self._answer_seconds = answer_seconds
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._polls: dict[int, tuple[float, Any]] = {}
        self._asked_at: dict[int, float] = {}
        self.places: list[Place] = []
        self._placement = placement_group([dict(worker)] * num_workers, strategy="PACK")
        try:
            self._wait_for_placement(num_workers, keep_waiting)
            actor = ray.remote(
                num_cpus=worker["CPU"], num_gpus=worker.get("GPU", 0.0), max_restarts=0, max_concurrency=2
            )(RankProcess)
            self._actors = [
                actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index)).remote()
                for index in range(num_workers)
            ]
            self._take_places()
        except BaseException:
            self.end()
            raise

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self._actors)

    @property
    def node_ids(self) -> list[str]:
        """The node of each rank."""
        return [place.node_id for place in self.places]

    def start(self, job: Job) -> None:
        """Let every rank join the others and train. Raises AttemptFailed."""
        port = self._answers([self._actors[0].listen.remote()])[0]
        self._runs = [
            actor.train.remote(job, env) for actor, env in zip(self._actors, rank_envs(self.places, port), strict=True)
        ]

    def poll(self, command: Command) -> list[ProgressMessage]:
        """Pass the command on to rank 0 and fetch its messages; returns at once.

        Raises AttemptFailed if a rank has failed, died, or does not answer.
        """
        import ray

        now = time.monotonic()
        messages: list[ProgressMessage] = []
        answers = [answer for _, answer in self._polls.values()]
        answered = set(ray.wait(answers, num_returns=len(answers), timeout=0)[0]) if answers else set()
        for rank, (since, answer) in list(self._polls.items()):
            if answer in answered:
                del self._polls[rank]
                with contextlib.suppress(ray.exceptions.RayError):  # its run ends too, and says why
                    messages += ray.get(answer)
            elif now - since > self._answer_seconds:
                # What the others wait in, and where this one is if it can be interrupted, before all of them are ended.
                signal_all(((place.node_id, place.process) for place in self.places), signal.SIGUSR1)
                raise AttemptFailed(
                    f"{self._described(rank)} has not answered for {now - since:.0f} s: "
                    f"the process is stopped, or its node cannot be reached"
                )
        for rank, actor in enumerate(self._actors):
            if rank not in self._polls and (rank == 0 or now - self._asked_at.get(rank, 0.0) > _HEARTBEAT_SECONDS):
                self._asked_at[rank] = now
                self._polls[rank] = (now, actor.poll.remote(command if rank == 0 else Command()))
        done, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        if any(isinstance(self._outcome(run), BaseException) for run in done) and self._failed_alone() is None:
            self._raise_failure()
        return messages

    @property
    def ended(self) -> bool:
        """Return whether a rank has ended by itself; the others do at the same step."""
        import ray

        return bool(ray.wait(self._runs, num_returns=1, timeout=0)[0])

    def results(self) -> tuple[list[RankResult], list[ProgressMessage]]:
        """Return the result of each rank and the last messages; waits for ranks that are still ending.

        Of a rank that failed alone and for good, its result is the only one: nobody waits for the others.

        Raises AttemptFailed if one of them does not end by itself.
        """
        import ray

        deadline = time.monotonic() + self._start_seconds
        outcomes: list[RankResult] = []
        running = list(self._runs)
        while running:
            done, running = ray.wait(running, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise AttemptFailed(f"{self._described(self._runs.index(running[0]))} did not end with the others")
            if (alone := self._failed_alone()) is not None:
                return [alone], []
            outcome = self._outcome(done[0])
            if isinstance(outcome, BaseException):
                self._raise_failure()
            else:
                outcomes.append(outcome)
        earlier = [self._polls[0][1]] if 0 in self._polls else []
        answers = self._answers([*earlier, self._actors[0].poll.remote(Command())])
        messages = [one for answer in answers for one in answer]
        return outcomes, messages

    def end(self) -> None:
        """Kill every process of the group and release its places; returns when the processes are gone.

        Ray asks a process to leave and kills it after 5 s, which also ends a stopped one. A process on an unreachable
        node ends with that node's Ray daemon, which exits when it notices that it is cut off.
        """
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)
        wait_until_gone((place.node_id, place.process) for place in self.places)
        self._actors = []

    def _failed_alone(self) -> RankResult | None:
        """Return the result of a rank that failed alone and for good, whatever became of the others since."""
        import ray

        done, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        outcomes = (self._outcome(run) for run in done)
        return next(
            (one for one in outcomes if isinstance(one, RankResult) and isinstance(one.refusal, RankError)), None
        )

    def _wait_for_placement(self, num_workers: int, keep_waiting: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._start_seconds
        while not self._placement.wait(timeout_seconds=1):
            keep_waiting()
            if time.monotonic() > deadline:
                raise AttemptFailed(
                    f"Ray found no places for {num_workers} workers within {self._start_seconds:.0f} s: "
                    f"is something else running on the cluster?"
                )

    def _take_places(self) -> None:
        """Fetch the location of every process, and sort the processes by node and GPU."""
        places: list[Place] = self._answers([actor.place.remote() for actor in self._actors])
        workers = sorted(zip(self._actors, places, strict=True), key=rank_order(places))
        self._actors = [actor for actor, _ in workers]
        self.places = [place for _, place in workers]

    def _answers(self, calls: list[Any]) -> list[Any]:
        import ray

        _, missing = ray.wait(calls, num_returns=len(calls), timeout=self._start_seconds)
        if missing:
            raise AttemptFailed(
                f"{len(missing)} of {len(calls)} worker processes did not start within {self._start_seconds:.0f} s"
            )
        try:
            return ray.get(calls)
        except ray.exceptions.RayError as error:
            raise AttemptFailed(f"a worker process ended while it started: {_reason(error)}") from None

    def _outcome(self, run: Any) -> RankResult | BaseException:
        import ray

        try:
            return ray.get(run)
        except ray.exceptions.RayError as error:
            return error

    def _raise_failure(self) -> NoReturn:
        """Raise AttemptFailed for the likely first failure: a rank that died, before ranks that raised an error."""
        import ray

        ray.wait(self._runs, num_returns=len(self._runs), timeout=_AFTERMATH_SECONDS)
        done, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        failures = {
            rank: outcome
            for rank, run in enumerate(self._runs)
            if run in done and isinstance(outcome := self._outcome(run), BaseException)
        }
        died = [rank for rank, error in failures.items() if isinstance(error, ray.exceptions.RayActorError)]
        first = min(died or failures)
        raise AttemptFailed(f"{self._described(first)} {'died' if died else 'failed'}: {_reason(failures[first])}")

    def _described(self, rank: int) -> str:
        place = self.places[rank]
        return f"rank {rank} (process {place.process.pid} on {place.address})"


def rank_order(places: Sequence[Place]) -> Callable[[tuple[Any, Place]], tuple[int, int, str]]:
    """Return the sort key of (worker, place) pairs: by node, and on a node by GPU.

    GPUs have numbers, or names ("GPU-1f...", "MIG-...") where the node's CUDA_VISIBLE_DEVICES has names.
    """
    nodes = list(dict.fromkeys(place.node_id for place in places))

    def key(worker: tuple[Any, Place]) -> tuple[int, int, str]:
        place = worker[1]
        gpu = place.gpu or ""
        return nodes.index(place.node_id), int(gpu) if gpu.isdecimal() else 0, gpu

    return key


def rank_envs(places: Sequence[Place], master_port: int) -> list[RankEnv]:
    """Return the environment of each rank for processes at `places`, in rank order. They meet at the first node."""
    found: list[RankEnv] = []
    for _, of_node in groupby(places, key=lambda place: place.node_id):
        ranks = list(of_node)
        gpus = tuple(place.gpu for place in ranks if place.gpu is not None)
        found += [
            RankEnv(
                rank=len(found) + local_rank,
                world_size=len(places),
                local_rank=local_rank,
                local_world_size=len(ranks),
                master_address=places[0].address,
                master_port=master_port,
                gpus=gpus,
            )
            for local_rank in range(len(ranks))
        ]
    return found


def _reason(error: BaseException) -> str:
    """Return Ray's message without its guesses; for an exception in a worker, the last lines, which name it."""
    from ray.exceptions import RayActorError

    lines = str(error).strip().splitlines()
    if isinstance(error, RayActorError):
        return lines[-1].partition(" Some common causes include")[0]
    return "\n".join(lines[-20:])
