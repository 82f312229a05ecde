"""The checkpoints of one run: which folders are complete, how one is written, kept, found and read back.

Knows folders, the order of writing, and how the ranks agree; does not know what engine and data stream put inside.

    <run directory>/checkpoints/
        step_00000010/                  visible only when complete
            engine/                     what `Engine.save` wrote: weights, optimizer, schedule
            data.json                   the merged data stream states of all data-parallel ranks
            metadata.json               step, tokens, losses, size and CRC-32 of every file; written last
        .step_00000020.partial/         being written, or left behind by a killed run: never read, and removed
                                        when the run starts again
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.api import CheckpointException

from dash_dist.training.control import ControlGroup
from dash_dist.training.errors import CheckpointError

_STEP_FOLDER = re.compile(r"^step_(\d{8,})$")
_PARTIAL_FOLDER = re.compile(r"^\.step_\d{8,}\.partial$")
_METADATA = "metadata.json"
_DATA_STATE = "data.json"
_ENGINE = "engine"


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs; both calls are made at every rank.

    `load` says, in words, what differs from the run that saved although it may.
    """

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> list[str]: ...


@dataclass(frozen=True)
class RunState:
    """Where a run stands: `step` optimizer steps done on `tokens` tokens; `first_loss` is that of step 1.

    `origin` is the checkpoint the run was started from (`run.resume=PATH`), None for a run from scratch;
    `skipped_in_a_row` and `recent_losses` are what the LossGuard goes on from.
    """

    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    origin: str | None = None
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    step: int
    folder: Path


class CheckpointManager:
    """Writes, keeps and finds the checkpoints below `run_directory`. Every method is called at every rank.

    Args:
        run_directory: folder of the run, on a filesystem that all ranks share.
        control: the ranks that write together.
        keep: how many complete checkpoints stay; the oldest go first.
    """

    def __init__(self, run_directory: Path, control: ControlGroup, *, keep: int) -> None:
        self.directory = run_directory / "checkpoints"
        self._control = control
        self._keep = keep
        self._started: Saved | None = None

    def save(
        self, state: RunState, engine: Saveable, data_states: Sequence[Any], merge: Callable[[list[Any]], Any]
    ) -> Path:
        """Write one checkpoint and drop those beyond `keep`; returns its folder.

        `data_states` holds this rank's data stream states (none on a rank that reads no data of its own); `merge`
        turns those of all ranks into one. Raises CheckpointError at every rank if any rank fails to write; earlier
        checkpoints are untouched then.
        """
        final = self.directory / step_folder(state.step)
        partial = self.directory / f".{final.name}.partial"
        on_main = self._control.is_main
        failure = f"cannot write checkpoint {final} (earlier ones are kept; is there space, and may it be written?)"
        try:
            with self._control.together(failure, CheckpointError):
                if on_main:
                    _remove(partial)
                    partial.mkdir(parents=True)
            with self._control.together(failure, CheckpointError), _distributed_checkpoint("write"):
                engine.save(partial / _ENGINE)
            files = self._checksums(partial)
            gathered = self._control.gather(list(data_states))
            with self._control.together(failure, CheckpointError):
                if on_main:
                    merged = merge([one for states in gathered for one in states])
                    _write_json(partial / _DATA_STATE, merged)
                    files[_DATA_STATE] = _checksum(partial / _DATA_STATE)
                    _write_json(partial / _METADATA, {"state": asdict(state), "files": files})
                    _sync_folders(partial)
                    _remove(final)
                    os.replace(partial, final)
                    _sync(self.directory)
        except CheckpointError:
            if on_main:
                with contextlib.suppress(OSError):  # the error that brought us here is the one to report
                    _remove(partial)
            raise
        with self._control.together(f"{final} is written, but older checkpoints cannot be removed", CheckpointError):
            if on_main:
                self._drop_old()
        return final

    @property
    def pending(self) -> bool:
        return self._started is not None

    def writing(self) -> bool:
        return False

    def start(
        self, state: RunState, engine: Saveable, data_states: Sequence[Any], merge: Callable[[list[Any]], Any]
    ) -> None:
        self._started = Saved(state.step, self.save(state, engine, data_states, merge))

    def finish(self) -> "Saved | None":
        saved, self._started = self._started, None
        return saved

    def close(self) -> None:
        self._started = None

    def load(self, folder: Path, engine: Saveable) -> tuple[RunState, Any, list[str]]:
        """Verify `folder` and load it into `engine`.

        Returns the run's state, the merged data stream state, and what `engine.load` says.

        Raises CheckpointError at every rank if a file is missing, of another size, or of another checksum.
        """
        with self._control.together(f"cannot read checkpoint {folder}", CheckpointError):
            metadata = _read_metadata(folder)
            self._verify(folder, metadata["files"])
            data_state = json.loads((folder / _DATA_STATE).read_text())
        failure = f"cannot load checkpoint {folder}"
        with self._control.together(failure, CheckpointError), _distributed_checkpoint("read"):
            changes = engine.load(folder / _ENGINE)
        return RunState(**metadata["state"]), data_state, changes

    def clean(self) -> None:
        """Remove what a killed run left half written."""
        with self._control.together(f"cannot clean {self.directory}", CheckpointError):
            if self._control.is_main and self.directory.is_dir():
                for folder in self.directory.iterdir():
                    if _PARTIAL_FOLDER.match(folder.name):
                        shutil.rmtree(folder)

    def resume_from(self, resume: str) -> Path | None:
        """The checkpoint this run starts from under `run.resume`, None for a start from scratch.

        "auto" takes the run's latest complete checkpoint. "never" refuses a run folder that holds any. A path begins a
        new run from that checkpoint; a run begun that way goes on from its own latest checkpoint, so that the same
        command can be repeated after a failure.
        """
        chosen: Path | None = None
        with self._control.together("cannot resume", CheckpointError):
            if self._control.is_main:
                chosen = choose_checkpoint(self.directory, resume)
        return self._control.from_main(chosen)

    def _drop_old(self) -> None:
        for _, folder in complete_checkpoints(self.directory)[: -self._keep]:
            # Renamed first: a folder that is only half removed must not look complete.
            doomed = folder.with_name(f".{folder.name}.partial")
            os.replace(folder, doomed)
            shutil.rmtree(doomed)

    def _checksums(self, folder: Path) -> dict[str, list[int]]:
        """Flush every file below `folder` to disk and take its size and CRC-32; the ranks share the reading."""
        names: list[str] = []
        if self._control.is_main:
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = self._control.from_main(names)
        mine: dict[str, list[int]] = {}
        with self._control.together(f"cannot read back {folder}", CheckpointError):
            for name in names[self._control.rank :: self._control.size]:
                _sync(folder / name)
                mine[name] = _checksum(folder / name)
        return {name: checksum for part in self._control.gather(mine) for name, checksum in part.items()}

    def _verify(self, folder: Path, files: dict[str, list[int]]) -> None:
        for name in sorted(files)[self._control.rank :: self._control.size]:
            found = _checksum(folder / name)
            if found != files[name]:
                raise CheckpointError(
                    f"{folder / name} is damaged: size and CRC-32 are {found}, written were {files[name]}; "
                    f"resume from another checkpoint with run.resume=PATH and another run.name"
                )


@contextlib.contextmanager
def _distributed_checkpoint(verb: str) -> Iterator[None]:
    """What torch's distributed checkpoint raises, at every rank, is not an Exception: make it one."""
    try:
        yield
    except CheckpointException as error:
        reasons = {rank: str(failure[0]) for rank, failure in error.failures.items()}
        raise CheckpointError(
            f"the ranks could not {verb}: {reasons}" if reasons else f"a rank could not {verb}"
        ) from error


def step_folder(step: int) -> str:
    """Name of the folder that holds the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder name says."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP_FOLDER.match(path.name))]
    return sorted(one for one in found if (one[1] / _METADATA).is_file())


def choose_checkpoint(directory: Path, resume: str) -> Path | None:
    """One process's part of `CheckpointManager.resume_from`. Raises CheckpointError."""
    own = complete_checkpoints(directory)
    latest = own[-1][1] if own else None
    if resume == "auto":
        return latest
    if resume == "never":
        if latest is not None:
            raise CheckpointError(
                f"run.resume=never, but the run already has {latest}: give the run another run.name, "
                f"remove {directory.parent}, or set run.resume=auto to go on"
            )
        return None
    given = Path(resume).resolve()
    if latest is not None:
        if _read_metadata(latest)["state"]["origin"] == str(given):
            return latest
        raise CheckpointError(
            f"run.resume={resume}, but the run already has {latest}: give the new run another run.name, "
            f"or set run.resume=auto to go on from the latest"
        )
    _read_metadata(given)
    return given


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _METADATA).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a complete checkpoint (no {_METADATA} in it): name a step_* folder"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / _METADATA} is damaged: {error}") from None


def _checksum(path: Path) -> list[int]:
    crc = size = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            crc = zlib.crc32(part, crc)
            size += len(part)
    return [size, crc]


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folders(top: Path) -> None:
    for path in [*(path for path in top.rglob("*") if path.is_dir()), top]:
        _sync(path)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
