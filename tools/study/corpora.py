"""Files of the texts that the study's models are trained on.

Knows folders and formats; does not know models. Texts of a task are conversations: the data section counts answers in
the loss by its chat template.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from tools.benchmarks.common.conversations import as_messages, as_row, copies, source, write_template
from tools.benchmarks.extension.corpus import write_code
from tools.study.sizes import Settings, Size
from tools.study.tasks import TASKS
from tools.study.text import Text

_TEMPLATE = "template.jinja"
_TRAINING, _HELD_OUT = "train", "heldout"
_CODE = "code"
_COPIES, _FIRST = "copies.jsonl", "first.jsonl"
_CELLS = 8
"""A text has at least so many cells."""
_POLL = 0.2


def held_out_text(task: str, size: Size, length: int, index: int) -> Text:
    """Return text `index` of those that test a task at a length; none of them is trained on."""
    return _text(task, size, _HELD_OUT, length, index)


@contextlib.contextmanager
def locked(folder: Path, corpus: str, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes from the texts of a corpus: they are written and tokenised by one process, once.

    Args:
        waiting: called again and again while another process has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{corpus if corpus in TASKS else _CODE}.lock").open("w") as file:
        while not _try_lock(file):
            waiting()
            time.sleep(_POLL)
        yield  # the lock goes with the file


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_corpus(folder: Path, corpus: str, size: Size) -> str:
    """Write the texts of a corpus that are not there yet; returns a digest of all. See `locked`.

    Args:
        corpus: see `Part`.
    """
    if corpus in TASKS:
        _write_task(folder / corpus, corpus, size)
        files = [folder / corpus / name for name in (_COPIES, _FIRST, *map(_file, size.texts))]
    else:
        files = [folder / _CODE / f"{part}.jsonl" for part in (_TRAINING, _HELD_OUT)]
        if not all(file.is_file() for file in files):
            unfinished = folder / f"{_CODE}.unfinished"
            write_code(unfinished, document=4 * max(size.code_lengths.values()), megabytes=size.megabytes)
            unfinished.rename(folder / _CODE)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def task_data(folder: Path, corpus: str, lengths: Iterable[int]) -> Settings:
    """Return the section `data:` of a task with texts of some lengths, without its order and cache."""
    names = {f"{length} tokens": _file(length) for length in lengths}
    return {"sources": _sources(folder / corpus, names), "documents": "separate"}


def first_data(folder: Path, corpus: str) -> dict[str, Settings]:
    """Return what is different in that section in the stages before, by their names in order."""
    files = {"copies": _COPIES, "first": _FIRST}
    return {name: {"sources": _sources(folder / corpus, {name: file})} for name, file in files.items()}


def code_data(folder: Path) -> tuple[Settings, Settings]:
    """Return the section `data:` of code, without its order and cache, and that of the packages held out."""
    training, held_out = (
        {"source": "files", "paths": str(folder / _CODE / f"{part}.jsonl"), "documents": "joined"}
        for part in (_TRAINING, _HELD_OUT)
    )
    return training, held_out


def _write_task(folder: Path, task: str, size: Size) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (template := folder / _TEMPLATE).is_file():
        unfinished = template.with_suffix(".unfinished")
        write_template(unfinished)
        unfinished.rename(template)
    turns = copies(random.Random(task), size.copies, size.copied)
    _write_texts(folder / _COPIES, map(as_messages, ([turn] for turn in turns)))
    first = (TASKS[task].first_text(f"{_FIRST}/{task}/{index}") for index in range(size.first_texts))
    _write_texts(folder / _FIRST, (text.messages for text in first))
    for length, count in size.texts.items():
        texts = (_text(task, size, _TRAINING, length, index) for index in range(count))
        _write_texts(folder / _file(length), (text.messages for text in texts))


def _write_texts(path: Path, texts: Iterable[list[dict[str, str]]]) -> None:
    """Write the messages of texts, unless the file is there."""
    if path.is_file():
        return
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w") as file:
        file.writelines(map(as_row, texts))
    unfinished.rename(path)


def _sources(folder: Path, names: dict[str, str]) -> list[Settings]:
    return [source(label, [folder / name], folder / _TEMPLATE) | {"weight": 1.0} for label, name in names.items()]


def _file(length: int) -> str:
    return f"{length}.jsonl"


def _text(task: str, size: Size, part: str, length: int, index: int) -> Text:
    seed = f"{part}/{task}/{length}/{index}"
    cell = min(size.chunk_size, length // _CELLS)
    return TASKS[task].text(seed, length=length, planned=size.trained_length, cell=cell)
