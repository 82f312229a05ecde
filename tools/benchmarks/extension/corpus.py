"""Documents of the extension: code of the installed packages, copies, and questions about facts hidden in long texts.

Knows files and lengths; does not know models.
"""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from dash_dist.data.tokenizer import Tokenizer
from dash_dist.evaluation.samples import make_sample
from dash_dist.evaluation.suites import SUITES
from dash_dist.evaluation.words import Filler, invented_words
from tools.benchmarks.common.conversations import Turn, as_messages, as_row, copies

HELD_OUT_PACKAGES = 8
"""One package of so many is held out."""
COPIES = "copies.jsonl"
"""Name of the file of copies."""
TEMPLATE = "template.jinja"
"""Name of the chat template of copies and questions."""
_LONGEST_FILE = 400_000
_TOKENS_OF_A_NAME = 64  # of a text, for each name with a number in it; half of them are asked for
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
    """Write documents of copies.

    Args:
        length: tokens of a document, its end included.
    """
    with (folder / COPIES).open("w") as file:
        for turn in copies(random.Random(_SEED_OF_TRAINING), count, length):
            file.write(as_row(as_messages([turn])))


def write_questions(folder: Path, tokenizer: Tokenizer, documents: Mapping[int, int]) -> None:
    """Write texts with questions and answers: in turn one of the suite `retrieval`, and one with many questions.

    A text of the suite has one question. Of the tokens of a long one so few are an answer that little is learned.

    Args:
        documents: their number by length in tokens, the end of a document included.
    """
    for length, count in documents.items():
        tasks = itertools.cycle(SUITES["retrieval"])
        with (folder / questions_of(length)).open("w") as file:
            for index in range(count):
                if index % 2:
                    turns = list(_many_questions(random.Random(f"{length}/{index}"), tokenizer, length - 1))
                else:
                    sample = make_sample(next(tasks), tokenizer, length=length - 1, index=index, seed=_SEED_OF_TRAINING)
                    turns = [Turn(tokenizer.decode(sample.prompt), tokenizer.decode(sample.answer))]
                file.write(as_row(as_messages(turns)))


def _many_questions(rng: random.Random, tokenizer: Tokenizer, length: int) -> Iterator[Turn]:
    """Yield the turns of a text of `length` tokens, with the numbers of many names: half of them are asked for."""
    names = invented_words(rng, max(2, length // _TOKENS_OF_A_NAME))
    numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in names]
    facts = [f"The number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    asked = rng.sample(range(len(names)), max(1, len(names) // 2))
    questions = [Turn(f"\nThe number of {names[one]} is", f" {numbers[one]}") for one in asked]
    introduction = "\nSome names have a number in this text.\n"
    filler, sentences = Filler(rng), facts
    room = length - _tokens(tokenizer, introduction + " ".join(facts) + "".join(map("".join, questions)))
    for number in itertools.count(1):
        sentence = f" {filler.first(number)[-1]}"
        size = _tokens(tokenizer, sentence)
        if size > room:
            break
        sentences, room = [*sentences, sentence.strip()], room - size
    rng.shuffle(sentences)
    text = introduction + " ".join(sentences)
    (encoded,) = tokenizer.encode_batch([sentence])
    lead_in = tokenizer.decode(encoded[len(encoded) - room :]) if room else ""
    first, *others = questions
    yield Turn(lead_in + text + first.question, first.answer)
    yield from others


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    (encoded,) = tokenizer.encode_batch([text])
    return len(encoded)


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
