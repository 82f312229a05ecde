"""The storage that a run's checkpoints go to: its speed, its space, and whether its promises can be relied on.

Knows the run's directory; leaves nothing there.
"""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from dash_dist.config.model import padded_vocab_size
from dash_dist.config.run import RunConfig
from dash_dist.data.tokenizer import load_tokenizer
from dash_dist.distributed.agreement import Agreement
from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, warning
from dash_dist.doctor.site import Site

_TRIAL_BYTES = 256 * 2**20
_BLOCK_BYTES = 4 * 2**20
_SLOW = 0.05
"""GB/s below which a checkpoint of a small model takes minutes."""
_BYTES_PER_PARAMETER = 16
"""Of a checkpoint, at most: weights, and in float32 the master weights and two moments."""
_LEAST_FREE = 2**30
_ELSEWHERE = "Set run.directory to storage that this user may write to and that all nodes share."


def speed(site: Site) -> list[Finding]:
    """Write, flush and read back; then rename and flush a folder, as a checkpoint is published."""
    name = f"storage of {site.directory}"
    try:
        with trial_folder(site.directory) as folder:
            return [*_write_and_read(name, folder), _publish(folder)]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return [
                failure(
                    name,
                    f"{error.strerror} while {_TRIAL_BYTES >> 20} MiB were written",
                    "Free space, raise the quota or the limit on file sizes (ulimit -f), or set another run.directory.",
                )
            ]
        return [failure(name, f"{error.strerror}: {error.filename}", _ELSEWHERE)]


def _write_and_read(name: str, folder: Path) -> list[Finding]:
    block = secrets.token_bytes(_BLOCK_BYTES)  # random, so that no storage compresses it
    path = folder / "trial"
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(_TRIAL_BYTES // _BLOCK_BYTES):
            if file.write(block) != _BLOCK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file.fileno())
        written = _TRIAL_BYTES / (time.monotonic() - started) / 1e9
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or the cache would be read, not the storage
    expected = zlib.crc32(block)
    started = time.monotonic()
    damaged = 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(_BLOCK_BYTES):
            damaged += zlib.crc32(part) != expected
    read = _TRIAL_BYTES / (time.monotonic() - started) / 1e9
    if damaged:
        return [
            failure(
                name,
                f"{damaged} of {_TRIAL_BYTES // _BLOCK_BYTES} blocks came back changed",
                "Do not keep runs here: have the disk or the network file system repaired.",
            )
        ]
    advice = "Keep runs on faster storage; checkpoint.interval sets how often a checkpoint is written."
    findings = []
    for what, measured in (("written and flushed", written), ("read back", read)):
        text = f"{_TRIAL_BYTES >> 20} MiB {what} at {measured:.2f} GB/s"
        slow = measured < _SLOW
        findings.append(warning(name, text, advice, measured, "GB/s") if slow else ok(name, text, measured, "GB/s"))
    return findings


def _publish(folder: Path) -> Finding:
    """As a checkpoint is: a folder renamed over nothing, and its parent flushed."""
    partial, final = folder / ".partial", folder / "final"
    partial.mkdir()
    (partial / "file").write_bytes(b"content")
    os.replace(partial, final)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if partial.exists() or (final / "file").read_bytes() != b"content":
        return failure("atomic rename", "a renamed folder is not where it should be", _ELSEWHERE)
    return ok("atomic rename", "folders are renamed and flushed")


def space(site: Site) -> list[Finding]:
    """Free space against what the run's checkpoints will take."""
    name = "free space"
    existing = next(path for path in (site.directory, *site.directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB"
    advice = "Free space, or set another run.directory; checkpoint.keep says how many checkpoints stay."
    if site.config is None:
        if free < _LEAST_FREE:
            return [warning(name, text, advice, free / 2**30, "GiB")]
        return [ok(name, text, free / 2**30, "GiB")]
    one = _BYTES_PER_PARAMETER * _parameters(site.config)
    # One more is being written before the oldest goes.
    needed = one * (site.config.checkpoint.keep + 1)
    text += (
        f"; the run keeps {site.config.checkpoint.keep} checkpoints of up to {one / 2**30:.2f} GiB, and writes another"
    )
    if free < needed:
        return [failure(name, text, advice, free / 2**30, "GiB")]
    if free < 2 * needed:
        return [warning(name, text, advice, free / 2**30, "GiB")]
    return [ok(name, text, free / 2**30, "GiB")]


def _parameters(config: RunConfig) -> int:
    """Weights of the whole model. A tokenizer that cannot be loaded is reported elsewhere: its rows are left out."""
    model = config.model
    width = model.resolved_head_dim
    try:
        rows = padded_vocab_size(
            load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document).vocab_size
        )
    except (OSError, ValueError):
        rows = 0
    matrices = 2 * model.num_attention_heads * width + 2 * model.num_kv_heads * width + 3 * model.ffn_hidden_size
    layer = model.hidden_size * (matrices + 2) + model.num_kv_heads * width
    embeddings = 1 if model.tie_embeddings else 2
    return model.num_layers * layer + model.hidden_size * (rows * embeddings + 1)


def shared(site: Site) -> list[Finding]:
    """Check that every rank sees a file that another rank wrote."""
    name = "directory seen by all ranks"
    agreement = Agreement()
    with contextlib.ExitStack() as cleanup:
        place: Path | None = None
        if agreement.is_main:
            with contextlib.suppress(OSError):  # the ranks, which see no file, say so
                folder = cleanup.enter_context(trial_folder(site.directory))
                word = secrets.token_hex(8)
                (folder / word).write_text(word)
                place = folder / word
        place = agreement.from_main(place)
        verdicts = agreement.gather(place is not None and _holds(place))
    blind = [index for index, verdict in enumerate(verdicts) if not verdict]
    if blind:
        return [
            failure(
                name, f"ranks {blind} of {agreement.size} do not see what rank 0 wrote in {site.directory}", _ELSEWHERE
            )
        ]
    return [ok(name, f"{agreement.size} ranks")]


def _holds(path: Path) -> bool:
    try:
        return path.read_text() == path.name
    except OSError:
        return False


@contextlib.contextmanager
def trial_folder(directory: Path) -> Iterator[Path]:
    """Make a folder in `directory`, which is made if need be; both are gone afterwards as if they had never been.

    Raises OSError where that cannot be.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=directory) as folder:
            yield Path(folder)
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # somebody else has begun to use it
                path.rmdir()


_STUCK = "The storage does not answer: see whether it is mounted (`df`, `mount`), or set another run.directory."

CHECKS = (
    Check("storage", speed, Where.CHILD, _STUCK),
    Check("free space", space, Where.CHILD, _STUCK, time_limit=30.0),
    Check("directory seen by all ranks", shared, Where.RANKS, _STUCK, time_limit=40.0),
)
