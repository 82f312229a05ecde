"""Checkpoint of an engine while it is being written.

Knows what is asked of it; does not know who writes what, nor how.
"""

from collections.abc import Mapping
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
