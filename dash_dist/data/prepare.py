"""The preparation of a corpus: every missing shard is tokenised once, by one process, several, or all ranks of a run.

Knows shards and who makes which; does not know how a shard is written.
"""

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from pathlib import Path

from dash_dist.config.data import DataConfig
from dash_dist.data.columns import DamagedDocument
from dash_dist.data.corpus import Corpus, record_corpus
from dash_dist.data.readers import FileRange, HubShard, read_documents, read_rows
from dash_dist.data.rows import encode_row, rows_of
from dash_dist.data.sources import Shard, Source, open_source
from dash_dist.data.token_shard import read_counts, write_shard
from dash_dist.data.tokenizer import Tokenizer, load_tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import ConfigError

_POLL_SECONDS = 0.05
_REPORT_SECONDS = 10.0

Note = Callable[[str], None]


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of the tokens: data.cache, or dash-dist/data in the user's cache."""
    if config.cache is not None:
        return config.cache.expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash-dist" / "data"


@dataclass(frozen=True)
class Preparation:
    """The sources of a configuration, to be prepared for one tokenizer.

    Attributes:
        reading: everything besides the files that decides on the tokens.
    """

    config: DataConfig
    tokenizer: Tokenizer
    cache: Path
    sources: tuple[Source, ...]
    reading: tuple[object, ...]

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer) -> "Preparation":
        """Find the files of all sources. Raises as `open_source` and `rows_of` do."""
        cache, reading = cache_folder(config), (tokenizer.fingerprint, config.special_tokens)
        sources = tuple(
            open_source(one, cache, list(reading), rows_of(one, tokenizer, config.tokenizer))
            for one in config.all_sources
        )
        return cls(config, tokenizer, cache, sources, reading)

    @property
    def shards(self) -> list[Shard]:
        """All shards, each key once."""
        return list({shard.key: shard for source in self.sources for shard in source.shards}.values())

    def missing(self) -> list[Shard]:
        """Return the shards without tokens in the cache. Raises ValueError for a damaged one."""
        missing = []
        for shard in self.shards:
            counts = read_counts(shard_folder(self.cache, shard))
            if counts is None:
                missing.append(shard)
            elif counts.damaged and self.config.damaged == "stop":
                raise ValueError(f"{counts.names(shard)[0]}; repair or remove it, or set data.damaged=skip")
        return missing

    def record(self) -> str:
        """Write down the prepared corpus; returns its fingerprint."""
        with _writing_to(self.cache):
            return record_corpus(
                self.cache,
                self.sources,
                {shard.key: shard_folder(self.cache, shard) for shard in self.shards},
                end_of_document=self.tokenizer.end_of_document,
                reading=list(self.reading),
            )

    def open(self, fingerprint: str) -> Corpus:
        """Open the recorded corpus."""
        return Corpus(self.cache, fingerprint, self.tokenizer.end_of_document)


def shard_folder(cache: Path, shard: Shard) -> Path:
    """Return the folder of a shard's tokens."""
    return cache / "shards" / shard.key[:2] / shard.key


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    """Make the cache; errors of its storage say where it is, and how to choose another place."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not str(error.filename).startswith(str(cache)) and cache.is_dir():
            raise  # of the files that are read
        remedy = "make space, or set" if full else "set"
        raise OSError(
            error.errno, f"cannot write tokens to {cache}: {error.strerror}; {remedy} data.cache to another folder"
        ) from error


def _write(shard: Shard, cache: Path, tokenizer: Tokenizer, config: DataConfig) -> int:
    with _writing_to(cache):
        counts = write_shard(
            shard,
            shard_folder(cache, shard),
            tokenizer,
            stop_at_damage=config.damaged == "stop",
            special_tokens=config.special_tokens,
        )
    return counts.tokens


def prepare_here(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Prepare the corpus in this process, and open it.

    Raises:
        FileNotFoundError, PermissionError: files that are missing or may not be read.
        ValueError: a corpus without text, damaged files, missing columns.
    """
    preparation = Preparation.of(config, tokenizer)
    for shard in preparation.missing():
        _write(shard, preparation.cache, tokenizer, config)
    return preparation.open(preparation.record())


def read_first_documents(preparation: Preparation) -> None:
    """Read the first document of each source. Raises ValueError for a source without any, and as readers do."""
    for source in preparation.sources:
        parts = ((shard, part) for shard in source.shards for part in shard.parts)
        if source.shards and not any(_has_text(shard, part, preparation.tokenizer) for shard, part in parts):
            raise ValueError(f"{source.description} has no text")


def _has_text(shard: Shard, part: FileRange | HubShard, tokenizer: Tokenizer) -> bool:
    if shard.rows is None:
        for document in read_documents(part, shard.columns.names[0]):
            with contextlib.suppress(DamagedDocument):
                if any(document.pieces):
                    return True
        return False
    for row in read_rows(part, shard.columns):
        with contextlib.suppress(DamagedDocument):
            if not isinstance(row.values, DamagedDocument) and encode_row(shard.rows, row.values, tokenizer):
                return True
    return False


_tokenizer_of_worker: Tokenizer | None = None


def start_worker(config: DataConfig) -> None:
    """Load the tokenizer of a process of `prepare_in_processes`; the initializer of its pool."""
    global _tokenizer_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core
    _tokenizer_of_worker = load_tokenizer(config.tokenizer, end_of_document=config.end_of_document)


def _write_in_worker(shard: Shard, cache: Path, config: DataConfig) -> int:
    assert _tokenizer_of_worker is not None  # set by start_worker
    return _write(shard, cache, _tokenizer_of_worker, config)


def prepare_in_processes(
    preparation: Preparation, pool: Executor, done: Callable[[Shard, int], None] = lambda shard, tokens: None
) -> Corpus:
    """Prepare the missing shards in the processes of `pool`, each started with `start_worker`; returns the open corpus.

    Args:
        done: called with each finished shard and its tokens.
    """
    waiting: dict[Future[int], Shard] = {
        pool.submit(_write_in_worker, shard, preparation.cache, preparation.config): shard
        for shard in sorted(preparation.missing(), key=lambda shard: -shard.size)
    }
    try:
        for future in as_completed(waiting):
            done(waiting[future], future.result())
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
    return preparation.open(preparation.record())


def prepare_together(
    config: DataConfig, tokenizer: Tokenizer, control: ControlGroup, *, note: Note, beat: Callable[[], None]
) -> Corpus:
    """Prepare the corpus by all ranks of a run; returns the open corpus. Called at every rank.

    The first rank of each node finds the files. All ranks share what the main one misses; after that, the first rank of
    each node makes what its node still misses, where data.cache is not one folder for all nodes.

    Args:
        note: called at the main rank with a line of progress from time to time.
        beat: called while others are waited for.

    Raises:
        ConfigError: at every rank, if any rank cannot prepare its part.
    """
    leads = int(os.environ.get("LOCAL_RANK", "0")) == 0
    preparation: Preparation | None = None
    missing: list[Shard] = []
    with control.together("cannot prepare the data", ConfigError):
        if leads:
            preparation = Preparation.of(config, tokenizer)
            missing = preparation.missing()
    cache = cache_folder(config)
    shared = control.from_main(missing)
    own = shared[control.rank :: control.size]
    _write_together(own, cache, tokenizer, config, control, note=note, beat=beat, shards_of_all=len(shared))
    if shared or any(control.gather(bool(missing))):  # shared is the same at every rank
        with control.together("cannot prepare the data", ConfigError):
            missing = [] if preparation is None else preparation.missing()
        left = sum(control.gather(len(missing)))
        _write_together(missing, cache, tokenizer, config, control, note=note, beat=beat, shards_of_all=left)
    fingerprint = ""
    with control.together("cannot prepare the data", ConfigError):
        if preparation is not None:
            fingerprint = preparation.record()
    fingerprints = {one for one in control.gather(fingerprint) if one}
    with control.together("cannot prepare the data", ConfigError):
        if len(fingerprints) > 1:
            raise ValueError(
                f"the nodes see {len(fingerprints)} different corpora below the same paths: give all nodes the same "
                "files"
            )
        return Corpus(cache, fingerprints.pop(), tokenizer.end_of_document)


def _write_together(
    shards: Sequence[Shard],
    cache: Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    control: ControlGroup,
    *,
    note: Note,
    beat: Callable[[], None],
    shards_of_all: int,
) -> None:
    """Write this rank's `shards` while the ranks keep in touch, however long it takes."""
    if not shards_of_all:
        return
    finished, failure, end = 0, None, threading.Event()

    def write() -> None:
        nonlocal finished, failure
        try:
            for shard in shards:
                if end.is_set():
                    return
                _write(shard, cache, tokenizer, config)
                finished += 1
        except Exception as error:
            failure = error

    worker = threading.Thread(target=write, name="prepare-data", daemon=True)
    worker.start()
    reported = time.monotonic()
    for round_ in itertools.count():
        worker.join(min(1.0, _POLL_SECONDS * 1.5 ** min(round_, 10)))
        beat()
        states = control.gather((finished, worker.is_alive(), failure is not None))
        if any(failed for *_, failed in states):
            end.set()
            break
        if not any(alive for _, alive, _ in states):
            break
        if control.is_main and time.monotonic() - reported > _REPORT_SECONDS:
            note(f"preparing the data: {sum(done for done, *_ in states)} of {shards_of_all} shards are tokenised")
            reported = time.monotonic()
    with control.together("cannot prepare the data", ConfigError):
        if failure is not None:
            raise failure
