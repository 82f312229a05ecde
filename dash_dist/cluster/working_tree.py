"""The working tree as a job takes it along: which files, how large, in one archive.

Knows files and what git ignores; does not know Ray.
"""

import fnmatch
import subprocess
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from dash_dist.errors import ConfigError

# Left out wherever they are, and at the top of the tree.
_NEVER = (".git", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis")
_NOT_AT_THE_TOP = ("runs", "build", "dist", "tests", "docs")

# A tree of code is a few megabytes; every node fetches it, and Ray's head keeps it in memory.
MOST_BYTES = 100 << 20

_FOLDERS_NAMED = 5


def files_to_pack(root: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """The files of the tree at `root` that a job needs, relative to it and sorted.

    Left out are what git ignores, where the tree is of git, caches, virtual environments, runs, builds, tests and
    documentation at the top, and what matches a pattern in `exclude` (of a path in the tree, such as `data/*`).
    Raises ConfigError if what is left is larger than MOST_BYTES in sum.
    """
    known = _known_to_git(root)
    candidates = known if known is not None else [path.relative_to(root) for path in root.rglob("*")]
    files = sorted(path for path in candidates if not _left_out(path, exclude) and (root / path).is_file())
    sizes = {path: (root / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        folders: Counter[str] = Counter()
        for path, size in sizes.items():
            folders["/".join(path.parts[:2][: len(path.parts) - 1]) or str(path)] += size
        largest = ", ".join(f"{name} ({_mib(size)})" for name, size in folders.most_common(_FOLDERS_NAMED))
        raise ConfigError(
            f"the working tree {root} is {_mib(total)} and a job takes at most {_mib(MOST_BYTES)} along: the largest "
            f"are {largest}: submit from another folder, have git ignore them, or leave them out with --exclude "
            f"'FOLDER/*'"
        )
    return files


def pack(root: Path, files: Collection[Path], archive: Path) -> None:
    """Write `files` of the tree at `root` into the zip file `archive`. Raises OSError."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
        for path in files:
            packed.write(root / path, path)


def _known_to_git(root: Path) -> list[Path] | None:
    """Tracked and untracked files below `root` that git does not ignore; None without git or a repository."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [Path(name.decode(errors="surrogateescape")) for name in listed.split(b"\0") if name]


def _left_out(path: Path, exclude: Sequence[str]) -> bool:
    return (
        path.parts[0] in _NOT_AT_THE_TOP
        or any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in _NEVER)
        or any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in exclude)
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
