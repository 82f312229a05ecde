"""Interfaces through which a run saves and loads an engine.

Knows the calls and their order; does not know the files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dash_dist.checkpoints.integrity import FileChecksum


class PendingSave(Protocol):
    """Checkpoint that an engine is writing, at one rank."""

    def done(self) -> bool:
        """Return at once whether this rank's writing has ended, well or not."""
        ...

    def finish(self) -> Mapping[str, FileChecksum]:
        """Wait for the writing at every rank, and complete the files; every rank calls it.

        Returns the checksums of the files that this rank took while it wrote them, by path relative to the engine's
        folder; those of other files are taken by reading them. Raises OSError at every rank if any could not write.
        """
        ...

    def abandon(self) -> None:
        """End this rank's writing and leave the files incomplete. Waits for no other rank."""
        ...


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs. `start_save` and `load` are collectives."""

    def prepare_save(self) -> None:
        """Begin to allocate the host memory that `start_save` in the background needs; returns at once."""
        ...

    def start_save(self, directory: Path, *, background: bool) -> PendingSave:
        """Begin to write model, optimizer and step as they are now; later steps do not change the files.

        Saves in the background use the same host memory: each is finished or abandoned before the next begins.

        Args:
            directory: new or empty, on storage that all ranks share.
            background: return as soon as training can continue; otherwise when this rank has written. Either way the
                checkpoint is complete when `finish` of the result has returned.

        Raises:
            OSError: at every rank: the directory cannot be created, or is not empty.
            RankError: this rank's host has too little memory for a save in the background.
        """
        ...

    def load(self, directory: Path) -> list[str]:
        """Load a checkpoint, written at this layout or another.

        The model's shape must be that of the checkpoint. The learning rate follows this run's configuration from the
        checkpoint's step on.

        Returns:
            In words, each setting by which the weights now compute another function than the one they were trained in.

        Raises:
            FileNotFoundError: there is no complete checkpoint in the directory.
            ValueError: it is of another engine or model, or damaged; names the difference.
        """
        ...
