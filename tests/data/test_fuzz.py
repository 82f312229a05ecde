"""Files that nobody meant as documents: each corpus gives tokens or an error that names the file, and the position in
what is left resumes exactly.

HYPOTHESIS_PROFILE=long tries tens of thousands.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dash_dist.config.data import DataConfig
from dash_dist.data.stream import DataStream
from tests.data.chat_templates import CHATML, CHATML_MARKED, FORGETFUL, MISTRAL
from tests.data.data_streams import build, join_all

CASES = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 30
FUZZ = settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
STEPS = 3

names = st.sampled_from(
    ["a", "b", "deep/er/c", "d e", "ä", "\udcff", ".hidden", "[a]", "x" * 100, "new\nline", "weird*?", "~"]
)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"])
texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " \n", "\0", "\ufeff", "word " * 40, "é" * 50, "\r\n\r\n", "\x85\u2028\x0c", "<|endoftext|>"]),
)


# Named functions: hypothesis parses the source of a lambda, which Python 3.11.7 can fail (python/cpython#106905).
def encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding, errors="replace")


def lists_and_objects(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2))


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def line_of(text: str) -> bytes:
    return json_bytes({"text": text})


def line_of_messages(messages: list) -> bytes:
    return json_bytes({"messages": messages})


def table_of_text(rows: list) -> pa.Table:
    return pa.table({"text": pa.array(rows, pa.string())})


def table_of_bytes(rows: list) -> pa.Table:
    return pa.table({"text": pa.array(rows, pa.binary())})


encoded = st.builds(encode, texts, encodings)
contents = st.one_of(encoded, st.binary(max_size=60), st.just(b""), st.just(b"\xff" * 5000), st.just(b"x" * 70_000))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lists_and_objects,
    max_leaves=3,
)
good_lines = texts.map(line_of)
json_lines = st.one_of(
    good_lines,
    good_lines,
    st.dictionaries(st.one_of(st.just("text"), texts), json_values, max_size=2).map(json_bytes),
    json_values.map(json_bytes),
    encoded,
    st.binary(max_size=20),
    st.sampled_from(
        [b"", b"   ", b'{"text": "cut', b'{"text": "\\ud800"}', b'{"text": "a", "text": 1}', b"[" * 50_000]
        + [b"\xef\xbb\xbf" + b'{"text": "after a byte order mark"}', b'{"text": ' + b"9" * 5000 + b"}", b"NaN"]
        + [b'{"text": "a"} {"text": "b"}', b'{"text": "' + b"y" * 40_000 + b'"}', b"\x00", b'{"text": "\xff"}']
    ),
)


def fields_of(names: list[str]) -> st.SearchStrategy:
    """Lines with some of these fields and any values."""
    return st.dictionaries(st.sampled_from(names), st.one_of(texts, json_values), max_size=4).map(json_bytes)


def conversation(turns: list, tools: object) -> bytes:
    return json_bytes({"messages": turns, "tools": tools})


roles = st.sampled_from(["user", "assistant", "assistant", "system", "tool"])
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": texts}), max_size=2
)
turns = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": texts}),
    st.fixed_dictionaries(
        {"role": roles, "content": st.one_of(parts, json_values)}, optional={"tool_calls": json_values}
    ),
    json_values,
)
conversations = st.one_of(
    st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=5).map(line_of_messages),
    st.builds(conversation, st.lists(turns, max_size=4), st.one_of(st.none(), json_values, st.just("[{}]"))),
    fields_of(["messages", "tools", "text"]),
    json_lines,
)
completions = st.one_of(
    st.fixed_dictionaries({"prompt": texts, "completion": texts}).map(json_bytes),
    fields_of(["prompt", "completion"]),
    json_lines,
)
separators = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"])
TWICE = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
parquet_tables = st.one_of(
    st.lists(st.one_of(st.none(), texts), max_size=6).map(table_of_text),
    st.lists(st.one_of(st.none(), contents), max_size=6).map(table_of_bytes),
    st.just(pa.table({"other": ["x"]})),
    st.just(pa.table({"text": [["nested"]]})),
    st.just(pa.table({"text": pa.array([None, None], pa.null())})),
    st.just(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})),
    st.just(TWICE),
)


def steps_or_words(stream: DataStream, count: int, root: Path) -> list:
    """The rows of each step; the last may be the words of an error instead, after which nothing more is read."""
    found = []
    for _ in range(count):
        try:
            found.append(join_all(stream.next_step()))
        except (ValueError, OSError) as error:
            found.append(words_of(error, root))
            break
    return found


def words_of(error: Exception, root: Path) -> str:
    """Those of an error that a user can act on: they name a file below `root`, or say that there is no text."""
    text = str(error)
    text.encode()  # TensorBoard and pytest-xdist take no others
    named = str(root) in text or str(root).encode("unicode_escape").decode() in text
    assert named or "data.paths" in text, text
    return text


def check(root: Path, **options) -> None:
    """The corpus below `root` gives the same steps, or the same error, from every position that can be resumed."""
    config = DataConfig(source="files", paths=(str(root),), **options)

    def opened() -> DataStream | str:
        try:
            return build(config, length=8, batch=2, micro=1)
        except (ValueError, OSError) as error:
            return words_of(error, root)

    stream = opened()
    if isinstance(stream, str):
        assert opened() == stream
        return
    states = [json.dumps(stream.state_dict())]
    expected = []
    for _ in range(STEPS):
        expected += steps_or_words(stream, 1, root)
        if isinstance(expected[-1], str):
            break
        states.append(json.dumps(stream.state_dict()))
    for step, state in enumerate(states):
        resumed = opened()
        assert isinstance(resumed, DataStream)
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert steps_or_words(resumed, len(expected) - step, root) == expected[step:]
        if not isinstance(expected[-1], str):
            assert resumed.skipped_documents == stream.skipped_documents


def write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def in_a_folder():
    """in_a_folder(): a new folder for each example, all gone in the end."""
    top = Path(tempfile.mkdtemp(prefix="dash-dist-fuzz-"))
    yield lambda: Path(tempfile.mkdtemp(dir=top))
    shutil.rmtree(top)


FUZZ_FILES = settings(FUZZ, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
ORDERS = [
    {"shuffle_seed": None},
    {"shuffle_seed": 0},
    {"shuffle_seed": 2**63},
    {"shuffle_seed": 0, "cut_documents": 2},
    {"shuffle_seed": 2**63, "cut_documents": 11},
]
options = st.builds(
    dict,
    st.sampled_from(ORDERS),
    documents=st.sampled_from(["joined", "separate"]),
    damaged=st.sampled_from(["skip", "skip", "stop"]),
)


@FUZZ_FILES
@given(files=st.dictionaries(names, contents, max_size=5), chosen=options)
@example(files={"a": b"x", "\udcff": b"y" * 30}, chosen={})
def test_any_text_files(in_a_folder, files, chosen):
    root = in_a_folder()
    for name, content in files.items():
        write(root, f"{name}.txt", content)
    check(root, **chosen)


@FUZZ_FILES
@given(
    files=st.dictionaries(names, st.tuples(st.lists(json_lines, max_size=6), separators), min_size=1, max_size=3),
    chosen=options,
)
@example(files={"a": ([b"\xef\xbb\xbf" + b'{"text": "after a byte order mark"}'], b"\n")}, chosen={})
@example(files={"a": ([b'{"text": ' + b"9" * 5000 + b"}"], b"\n")}, chosen={})
def test_any_lines(in_a_folder, files, chosen):
    root = in_a_folder()
    for name, (lines, separator) in files.items():
        write(root, f"{name}.jsonl", separator.join(lines))
    check(root, **chosen)


TEMPLATES = {
    "chatml.jinja": CHATML,
    "marked.jinja": CHATML_MARKED,
    "picky.jinja": MISTRAL,
    "forgetful.jinja": FORGETFUL,
}


@FUZZ_FILES
@given(
    rows=st.one_of(
        st.tuples(st.just("messages"), st.lists(conversations, max_size=6), st.sampled_from(sorted(TEMPLATES))),
        st.tuples(st.just("completions"), st.lists(completions, max_size=6), st.none()),
    ),
    separator=separators,
    chosen=options,
)
def test_any_rows(in_a_folder, rows, separator, chosen):
    root, (kind, lines, template) = in_a_folder(), rows
    write(root, "data/a.jsonl", separator.join(lines))
    if template is not None:
        write(root, template, TEMPLATES[template].encode())
        chosen = {**chosen, "chat_template": root / template}
    check(root / "data", rows=kind, **chosen)


@FUZZ_FILES
@given(
    tables=st.dictionaries(names, st.tuples(parquet_tables, st.integers(1, 4)), min_size=1, max_size=3),
    damage=st.one_of(st.none(), st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=40))),
    chosen=options,
)
@example(tables={"\udcff": (pa.table({"text": ["text of a file"] * 5}), 2)}, damage=None, chosen={})
@example(tables={"a": (TWICE, 1)}, damage=None, chosen={})
def test_any_tables(in_a_folder, tables, damage, chosen):
    root = in_a_folder()
    for name, (table, row_group_size) in tables.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            pq.write_table(table, file, row_group_size=row_group_size)
    if damage is not None:
        content = bytearray(path.read_bytes())
        at = damage[0] % len(content)
        content[at : at + len(damage[1])] = damage[1]
        path.write_bytes(content)
    check(root, **chosen)


def test_folders_that_contain_themselves_are_read_once(tmp_path):
    root = tmp_path / "documents"
    write(root, "in/a.txt", b"text of a" * 5)
    write(root, "b.txt", b"text of b" * 5)
    (root / "in" / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    with pytest.raises(OSError, match="self"):
        build(DataConfig(source="files", paths=(str(root),)), batch=2)
    (root / "self").unlink()
    check(root)
