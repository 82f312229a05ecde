"""The checkpoints of one run: its ranks write them during training, and agree on the one to resume from.

Knows the order of writing and reading, and the ranks' agreement on it; does not know the content of the files, nor when
a checkpoint is due.

    <run directory>/checkpoints/step_00000010/      see `dash_dist.checkpoints.folders` for its other contents
        engine/                     what the engine wrote: weights, optimizer, schedule
        data.json                   the position in the datas of all data-parallel ranks
        metadata.json               step, tokens, losses, time, size and CRC-32 of every file; written last
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from dash_dist.checkpoints import folders, integrity
from dash_dist.checkpoints.folders import partial_folder, step_folder, step_of, visible_checkpoints
from dash_dist.checkpoints.integrity import (
    DATA_STATE,
    ENGINE,
    CheckpointMetadata,
    DamagedCheckpoint,
    FileChecksum,
    read_metadata,
)
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.saveable import PendingSave, Saveable
from dash_dist.errors import CheckpointError
from dash_dist.run.events import EventLog
from dash_dist.run.files import write_json
from dash_dist.run.state import RunState

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete and on disk.

    Attributes:
        blocked_seconds: time that training waited for it.
        seconds: time from its step to its completion.
        not_dropped: the error that kept older checkpoints from being removed; empty without one.
    """

    step: int
    folder: Path
    blocked_seconds: float
    seconds: float
    not_dropped: str


@dataclass
class _Started:
    """A checkpoint that is being written."""

    state: RunState
    started_at: float
    save: PendingSave
    data_state: Any
    blocked_seconds: float = 0.0


class CheckpointManager:
    """Writes, keeps and finds the checkpoints below `run_directory`.

    Every method but `writing` and `close` is called at every rank.

    Args:
        run_directory: folder of the run, on a filesystem that all ranks share.
        control: the ranks that write together.
        keep: number of complete checkpoints that stay; the oldest are removed first.
        keep_every_hours: hours between checkpoints that are never removed; None for no such checkpoint.
        asynchronous: write in the background while training continues.
    """

    def __init__(
        self,
        run_directory: Path,
        control: ControlGroup,
        *,
        keep: int,
        keep_every_hours: float | None = None,
        asynchronous: bool = True,
    ) -> None:
        self.directory = run_directory / "checkpoints"
        self.stepped_over: list[str] = []
        """Messages about the checkpoints that the last `resume_from` set aside, one each."""
        self._events = EventLog(run_directory)
        self._control = control
        self._keep = keep
        self._keep_every_hours = keep_every_hours
        self._asynchronous = asynchronous
        self._started: _Started | None = None
        self._verified: Path | None = None

    @property
    def pending(self) -> bool:
        """True while a checkpoint is started and not finished; the same at every rank."""
        return self._started is not None

    def writing(self) -> bool:
        """Return at once whether this rank still writes. Local.

        The loop takes the maximum over the ranks together with its other flags, and calls `finish` when it is False.
        """
        return self._started is not None and not self._started.save.done()

    def prepare(self, engine: Saveable) -> None:
        """Begin to allocate what an engine's first checkpoint needs, for which training would wait otherwise. Local."""
        if self._asynchronous:
            engine.prepare_save()

    def start(self, state: RunState, engine: Saveable, data_state: Any) -> None:
        """Begin one checkpoint, which is complete when `finish` has returned.

        Args:
            data_state: the position in the data, of which the main rank's is written.

        Raises:
            CheckpointError: at every rank, if any rank fails. Earlier checkpoints are untouched, and another one can
                be started.
        """
        if self._started is not None:
            raise RuntimeError(f"the checkpoint of step {self._started.state.step} is not finished")
        began, saved_at = time.monotonic(), time.time()
        partial = partial_folder(self._folder(state))
        with self._removing_partial(state):
            self._on_main_writing(state, lambda: folders.create_anew(partial))
            with self._together_writing(state), _distributed_checkpoint("write"):
                save = engine.start_save(partial / ENGINE, background=self._asynchronous)
                self._started = _Started(state, saved_at, save, data_state)
        self._started.blocked_seconds = time.monotonic() - began

    def finish(self) -> Saved | None:
        """Wait until the started checkpoint is written, complete it, and drop older ones. None if none was started.

        Raises CheckpointError at every rank if any rank failed to write. The partial checkpoint is removed, earlier
        ones are untouched, and another one can be started.
        """
        if self._started is None:
            return None
        started, began = self._started, time.monotonic()
        final = self._folder(started.state)
        with self._removing_partial(started.state):
            with self._together_writing(started.state), _distributed_checkpoint("write"):
                known = {f"{ENGINE}/{name}": checksum for name, checksum in started.save.finish().items()}
            self._started = None
            files = self._checksums(started.state, known)
            self._on_main_writing(started.state, lambda: self._complete(started, files))
        not_dropped = ""
        try:
            self._control.on_main(
                f"{final} is written, but older ones cannot be removed", CheckpointError, self._drop_old
            )
        except CheckpointError as error:  # this one is there all the same
            not_dropped = str(error)
        blocked = started.blocked_seconds + time.monotonic() - began
        return Saved(started.state.step, final, blocked, time.time() - started.started_at, not_dropped)

    def abandon(self) -> None:
        """Give up the started checkpoint at every rank, and remove its files."""
        if self._started is not None:
            self._give_up(self._started.state)

    def close(self) -> None:
        """Abandon this rank's writing at the end of the run. Local."""
        if self._started is not None:
            self._started.save.abandon()
            self._started = None

    def load(self, folder: Path, engine: Saveable) -> tuple[RunState, Any, list[str]]:
        """Load `folder` into `engine`, after verifying it unless `resume_from` just has.

        Returns the run's state, the position in the data, and the messages of `engine.load`.

        Raises CheckpointError at every rank if a file is missing, damaged or unsafe to unpickle, or does not fit the
        engine.
        """
        if folder != self._verified:
            messages = self._verify(folder)
            if messages:
                raise CheckpointError(f"cannot load checkpoint {folder}: {_in_short(messages)}")
        self._verified = None
        with self._control.together(f"cannot read checkpoint {folder}", CheckpointError):
            state, data_state = read_metadata(folder).state, integrity.read_data_state(folder)
        with (
            self._control.together(f"cannot load checkpoint {folder}", CheckpointError),
            _distributed_checkpoint("read"),
        ):
            changes = engine.load(folder / ENGINE)
        return state, data_state, changes

    def clean(self) -> None:
        """Remove the partial checkpoints of a killed run."""
        self._control.on_main(f"cannot clean {self.directory}", CheckpointError, lambda: folders.clean(self.directory))

    def resume_from(self, resume: str) -> Path | None:
        """Choose and verify the checkpoint to start from under `run.resume`; None for a start from scratch.

        "auto" takes the run's latest whole checkpoint; damaged ones after it are set aside, with an event each. "never"
        refuses a run folder that holds any. A path begins a new run from that checkpoint, which must be whole. When
        the same command is repeated, the run resumes from its own latest checkpoint.

        Raises CheckpointError at every rank: see above, or no checkpoint of the run is whole.
        """
        self.stepped_over = []
        found = self._visible()
        given = None if resume in ("auto", "never") else Path(resume).resolve()
        if resume == "never" and found:
            raise CheckpointError(
                f"run.resume=never, but the run already has {found[-1]}: give the run another run.name, "
                f"remove {self.directory.parent}, or set run.resume=auto to go on"
            )
        own = self._latest_whole(found)
        if given is None:
            return own
        if own is not None:
            origin = self._control.on_main(
                f"cannot read checkpoint {own}", CheckpointError, lambda: read_metadata(own).state.origin
            )
            if origin != str(given):
                raise CheckpointError(
                    f"cannot read checkpoint {own}: run.resume={resume}, but the run already has {own}: give the new "
                    f"run another run.name, or set run.resume=auto to continue from the latest"
                )
            return own
        messages = self._verify(given)
        if messages:
            raise CheckpointError(
                f"run.resume={resume}: {_in_short(messages)}; name another checkpoint's step_* folder"
            )
        self._verified = given
        return given

    def _visible(self) -> list[Path]:
        return self._control.on_main(
            f"cannot look for checkpoints in {self.directory}",
            CheckpointError,
            lambda: visible_checkpoints(self.directory),
        )

    def _latest_whole(self, found: Sequence[Path]) -> Path | None:
        for folder in reversed(found):
            messages = self._verify(folder)
            if not messages:
                self._verified = folder
                return folder
            set_aside = functools.partial(self._set_damaged_aside, folder, messages)
            self.stepped_over.append(self._control.on_main(f"cannot set {folder} aside", CheckpointError, set_aside))
        if found:
            raise CheckpointError(
                f"no checkpoint of the run is whole: {'; '.join(self.stepped_over)}. To begin anew, give the run "
                f"another run.name, with run.resume=PATH to begin from a checkpoint of another run"
            )
        return None

    def _set_damaged_aside(self, folder: Path, messages: Sequence[str]) -> str:
        """Rename a damaged checkpoint and record the event; returns its message."""
        place = folders.set_aside(folder, "damaged")
        message = f"{_in_short(messages)}; {folder.name} is set aside as {place.name}"
        self._events.append("checkpoint_damaged", message, step=step_of(folder))
        return message

    def _verify(self, folder: Path) -> list[str]:
        """Divide the files of `folder` among the ranks, and return messages about damage, the same at every rank."""
        failure = f"cannot read checkpoint {folder}"
        metadata, messages = self._control.on_main(failure, CheckpointError, lambda: _read_listing(folder))
        if metadata is None or messages:
            return messages
        by_size = sorted(metadata.files, key=lambda name: (metadata.files[name].size, name))
        with self._control.together(failure, CheckpointError):
            mine = integrity.find_damage(folder, metadata, by_size[self._control.rank :: self._control.size])
        suspect = [name for of_rank in self._control.gather(mine) for name in of_rank]
        if suspect:
            # Storage may look different to other ranks for a while: no good checkpoint is given up for that.
            listed = metadata
            messages = self._control.on_main(
                failure, CheckpointError, lambda: sorted(integrity.find_damage(folder, listed, suspect).values())
            )
        return messages

    def _checksums(self, state: RunState, known: dict[str, FileChecksum]) -> dict[str, FileChecksum]:
        """Return the checksum of every file; the ranks share the reading and flushing of those not in `known`."""
        partial = partial_folder(self._folder(state))
        known = {name: checksum for of_rank in self._control.gather(known) for name, checksum in of_rank.items()}
        unknown = self._on_main_writing(state, lambda: sorted(_files_in(partial) - known.keys()))
        mine: dict[str, FileChecksum] = {}
        with self._together_writing(state):
            for name in unknown[self._control.rank :: self._control.size]:
                folders.sync(partial / name)
                mine[name] = integrity.checksum_of(partial / name)
        read = {name: checksum for of_rank in self._control.gather(mine) for name, checksum in of_rank.items()}
        return known | read

    def _complete(self, started: _Started, files: dict[str, FileChecksum]) -> None:
        final = self._folder(started.state)
        partial = partial_folder(final)
        write_json(partial / DATA_STATE, started.data_state)
        files[DATA_STATE] = integrity.checksum_of(partial / DATA_STATE)
        integrity.write_metadata(partial, CheckpointMetadata(started.state, started.started_at, files))
        folders.publish(partial, final)

    def _drop_old(self) -> None:
        checkpoints = [(folder, _saved_at(folder)) for folder in visible_checkpoints(self.directory)]
        for folder in folders.outdated(checkpoints, keep=self._keep, keep_every_hours=self._keep_every_hours):
            folders.drop(folder)

    def _folder(self, state: RunState) -> Path:
        return self.directory / step_folder(state.step)

    def _together_writing(self, state: RunState) -> contextlib.AbstractContextManager[None]:
        return self._control.together(self._cannot_write(state), CheckpointError)

    def _on_main_writing(self, state: RunState, function: Callable[[], T]) -> T:
        return self._control.on_main(self._cannot_write(state), CheckpointError, function)

    def _cannot_write(self, state: RunState) -> str:
        folder = self._folder(state)
        return f"cannot write checkpoint {folder} (earlier ones are kept; is there space, and may it be written?)"

    @contextlib.contextmanager
    def _removing_partial(self, state: RunState) -> Iterator[None]:
        """Remove a checkpoint that any rank could not write."""
        try:
            yield
        except Exception as failure:  # at every rank, from `together`: CheckpointError, or a defect at one rank
            try:
                self._give_up(state)
            except RuntimeError as broken:  # after a defect the others have ended
                raise failure from broken
            raise

    def _give_up(self, state: RunState) -> None:
        self.close()
        self._control.gather(None)  # a barrier: no rank writes into the folder any more
        if self._control.is_main:
            with contextlib.suppress(OSError):  # the first error is the one to report
                folders.remove(partial_folder(self._folder(state)))


@contextlib.contextmanager
def _distributed_checkpoint(verb: str) -> Iterator[None]:
    """Turn the error of torch's distributed checkpoint, which is not an Exception, into a CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        reasons = {rank: str(failure[0]) for rank, failure in error.failures.items()}
        raise CheckpointError(
            f"the ranks could not {verb}: {reasons}" if reasons else f"a rank could not {verb}"
        ) from error


def _read_listing(folder: Path) -> tuple[CheckpointMetadata | None, list[str]]:
    """Return a checkpoint's metadata, and messages about files that it does not list; None if it is damaged."""
    try:
        metadata = read_metadata(folder)
        return metadata, list(integrity.find_unlisted(folder, metadata).values())
    except DamagedCheckpoint as error:
        return None, [str(error)]


def _files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _saved_at(folder: Path) -> float | None:
    try:
        return read_metadata(folder).saved_at
    except DamagedCheckpoint:
        return None


def _in_short(messages: Sequence[str]) -> str:
    """Join the first three messages, and count the others."""
    shown = "; ".join(messages[:3])
    return shown if len(messages) <= 3 else f"{shown}; and {len(messages) - 3} more files"
