"""Sources of random documents for the tests of batches, and which of their tokens are to be read and counted."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dash_dist.config.data import DataConfig
from tests.data.chat_templates import lines_of
from tests.data.data_streams import json_lines


def has_text(source: tuple[str, list[str], int]) -> bool:
    # Named: hypothesis parses the source of a lambda, which Python 3.11.7 can fail (python/cpython#106905).
    return any(source[1])


# Sources of JSON Lines, text files or tables, the documents of each, and their suffix.
TEXT_KINDS = ["text", "text.gz", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


ROW_KINDS = ["completions.jsonl", "completions.parquet", "messages.jsonl", "messages.parquet"]


def sources_of(kinds: list[str]) -> st.SearchStrategy:
    return st.lists(
        st.tuples(
            st.sampled_from(kinds),
            st.lists(
                st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40), min_size=1, max_size=9
            ),
            st.integers(1, 4),
        ).filter(has_text),
        min_size=1,
        max_size=3,
    )


LAYOUTS = st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (4, 4, 1), (6, 2, 3), (4, 1, 4)])


"""Global batch, data-parallel size, micro-batch."""


def write_source(folder: Path, kind: str, texts: list[str], per_file: int) -> None:
    """Write the texts below `folder`, in the order of their files' names; several a file where the format can."""
    folder.mkdir()

    def write(name: str, content: bytes) -> None:
        if kind.endswith(".gz"):
            content = gzip.compress(content)
        if kind.endswith(".zst"):
            content = pa.Codec("zstd").compress(content, asbytes=True)
        (folder / name).write_bytes(content)

    suffix = kind.removeprefix("text") if kind.startswith("text") else f".{kind}"
    for part in range(0, len(texts), 1 if kind.startswith("text") else per_file):
        rows, name = texts[part : part + per_file], f"{part:03d}{suffix}"
        if kind in ROW_KINDS:
            write_rows(folder / name.replace(kind, kind.partition(".")[2]), kind, rows)
        elif kind.startswith("text"):
            write(name, texts[part].encode())
        elif kind.startswith("jsonl"):
            write(name, json_lines(*rows))
        else:
            pq.write_table(pa.table({"text": rows}), folder / name, row_group_size=2)


def write_rows(path: Path, kind: str, texts: list[str]) -> None:
    """Write rows whose first half is a prompt; an empty text is an empty row."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    if kind.startswith("completions"):
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in halves]
    else:
        turns = [list(zip(("user", "assistant"), half, strict=True)) if any(half) else [] for half in halves]
        rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in turns]
    if path.suffix == ".jsonl":
        path.write_bytes(lines_of(*rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def config_of(root: Path, sources: list, **options) -> DataConfig:
    for number, (kind, texts, per_file) in enumerate(sources):
        write_source(root / f"{number}", kind, texts, per_file)
    (root / "contents.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    given: list[dict] = [{"paths": [str(root / f"{number}")]} for number in range(len(sources))]
    for one, (kind, *_) in zip(given, sources, strict=True):
        if kind in ROW_KINDS:
            one["rows"] = kind.partition(".")[0]
        if kind.startswith("messages"):
            one["chat_template"] = root / "contents.jinja"
    if len(given) == 1:
        return DataConfig(source="files", **given[0], **options)
    return DataConfig(sources=[{**one, "weight": number + 1} for number, one in enumerate(given)], **options)


def bytes_of(sources: list) -> list[list[bytes]]:
    """The documents as tokens: those of UTF-8 without a byte order mark at the start of a file."""

    def encoded(kind: str, text: str) -> bytes:
        return (text.removeprefix("\ufeff") if kind.startswith("text") else text).encode()

    return [[encoded(kind, text) for text in texts] for kind, texts, _ in sources]


def counts_of(sources: list) -> list[list[list[bool]]]:
    """Which tokens of the documents count in the loss, the end of the document included."""

    def counts(kind: str, text: str) -> list[bool]:
        size, prompt = len(text.encode()), len(text[: len(text) // 2].encode())
        if kind not in ROW_KINDS:
            return [True] * (size + 1)
        return [False] * prompt + [True] * (size - prompt) + [kind.startswith("completions")]

    # A mark at the start of a file is not part of its text.
    return [
        [counts(kind, text.removeprefix("\ufeff") if kind.startswith("text") else text) for text in texts]
        for kind, texts, _ in sources
    ]


def windows_that_count(counts: list[bool], start: int, size: int, number: int) -> list[int]:
    """Where the global batches of `size` tokens begin that are not passed over."""
    found: list[int] = []
    while len(found) < number:
        assert start + size < len(counts)
        if any(counts[start + 1 : start + size + 1]):
            found.append(start)
        start += size
    return found
