"""Documents of the extension: code of the installed packages, copies, and questions about facts hidden in long texts.

Knows files and lengths; does not know models.
"""

from __future__ import annotations

import itertools
import json
import random
import string
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from dash_dist.data.tokenizer import ByteTokenizer
from dash_dist.evaluation.samples import make_sample
from dash_dist.evaluation.suites import SUITES

HELD_OUT_PACKAGES = 8
"""One package of so many is held out."""
COPIES = "copies.jsonl"
"""Name of the file of copies."""
_LONGEST_FILE = 400_000
_LEAST_COPIED = 10  # characters
_SEED_OF_TRAINING = 1_000_000  # the evaluation's samples are of other seeds


def write_code(folder: Path, *, document: int, megabytes: float) -> None:
    """Write `train.jsonl` and `heldout.jsonl` to `folder`: the files of a package joined to documents.

    Args:
        document: characters of a document, about.
        megabytes: of text for training, at most; an eighth of that is held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"train": megabytes * 1e6, "heldout": megabytes * 1e6 / HELD_OUT_PACKAGES}
    written = dict.fromkeys(limits, 0)
    with (folder / "train.jsonl").open("w") as train, (folder / "heldout.jsonl").open("w") as heldout:
        files = {"train": train, "heldout": heldout}
        for package in _packages():
            part = "train" if zlib.crc32(package.name.encode()) % HELD_OUT_PACKAGES else "heldout"
            for text in _documents(package, document):
                if written[part] >= limits[part]:
                    break
                files[part].write(json.dumps({"text": text}) + "\n")
                written[part] += len(text)


def write_copies(folder: Path, count: int, length: int) -> None:
    """Write texts that come again and again, to be predicted from the second time on.

    A model that can copy can learn to look up a fact.

    Args:
        length: tokens of a document, its end included.
    """
    rng = random.Random(_SEED_OF_TRAINING)
    with (folder / COPIES).open("w") as file:
        for _ in range(count):
            symbols = rng.choices(
                string.ascii_lowercase + string.digits + " ", k=rng.randint(_LEAST_COPIED, length // 2)
            )
            text = "".join(itertools.islice(itertools.cycle(symbols), length - 1))
            file.write(json.dumps({"prompt": text[: len(symbols)], "completion": text[len(symbols) :]}) + "\n")


def write_questions(folder: Path, documents: Mapping[int, int]) -> None:
    """Write texts of the suite `retrieval`, each with its question and answer.

    Args:
        documents: their number by length in tokens, the end of a document included.
    """
    tokenizer = ByteTokenizer()
    for length, count in documents.items():
        tasks = itertools.cycle(SUITES["retrieval"])
        with (folder / questions_of(length)).open("w") as file:
            for index in range(count):
                sample = make_sample(next(tasks), tokenizer, length=length - 1, index=index, seed=_SEED_OF_TRAINING)
                row = {"prompt": tokenizer.decode(sample.prompt), "completion": tokenizer.decode(sample.answer)}
                file.write(json.dumps(row) + "\n")


def questions_of(length: int) -> str:
    """Return the name of the file of questions of a length."""
    return f"questions_{length}.jsonl"


def _packages() -> list[Path]:
    found: dict[str, Path] = {}
    for kind in ("purelib", "platlib", "stdlib"):
        root = Path(sysconfig.get_path(kind))
        for folder in root.iterdir():
            if folder.is_dir() and folder.name.isidentifier() and folder.name != "__pycache__":
                found.setdefault(folder.name, folder)
    return sorted(found.values(), key=lambda folder: zlib.crc32(folder.name.encode()))


def _documents(package: Path, size: int) -> Iterator[str]:
    parts: list[str] = []
    for file in sorted(package.rglob("*.py")):
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) > _LONGEST_FILE:
            continue
        parts.append(f"# {file.relative_to(package.parent)}\n{text}\n")
        if sum(map(len, parts)) >= size:
            yield "".join(parts)
            parts = []
    if parts:
        yield "".join(parts)
