"""The shards of a source, and the tokens of a shard on disk."""

import errno
import itertools
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from dash_dist.config.data import DataConfig
from dash_dist.data import prepare, sources, token_shard
from dash_dist.data.prepare import Preparation, prepare_here, shard_folder
from dash_dist.data.readers import FileRange, read_documents
from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.data_streams import END, TEXTS, build, documents_of, files, inputs, json_lines

MANY = [f"document {i:03d} " * (1 + i % 7) for i in range(200)]


@pytest.fixture
def small_shards(monkeypatch):
    """Cut as files of gigabytes are."""
    monkeypatch.setattr(sources, "_SHARD_BYTES", 1000)
    monkeypatch.setattr(sources, "_MAX_SHARD_BYTES", 3000)


def keys_of(config: DataConfig) -> list[str]:
    return [shard.key for shard in Preparation.of(config, ByteTokenizer()).shards]


def prefixes_of(config: DataConfig) -> list[str]:
    """The datasets of the shards, in order."""
    preparation = Preparation.of(config, ByteTokenizer())
    return [str(shard_folder(preparation.cache, shard) / "tokens") for shard in preparation.shards]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n\n"])
def test_long_files_of_lines_are_cut_without_losing_or_moving_a_line(tmp_path, small_shards, newline):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*MANY).replace(b"\n", newline))
    assert len(keys_of(files(tmp_path))) > 10
    assert documents_of(files(tmp_path)) == MANY


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n\n"])
def test_any_cut_of_a_file_gives_each_line_to_one_part(tmp_path, newline):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("a", "b" * 20, "", "c").replace(b"\n", newline))
    size = path.stat().st_size
    whole = list(read_documents(FileRange(str(path), "jsonl"), "text"))
    assert [document.pieces for document in whole] == [("a",), ("b" * 20,), ("",), ("c",)]
    for first, second in itertools.combinations_with_replacement(range(size + 1), 2):
        parts = [FileRange(str(path), "jsonl", *cut) for cut in ((0, first), (first, second), (second, size))]
        assert [document for part in parts for document in read_documents(part, "text")] == whole


def test_lines_of_cut_files_are_named_by_their_numbers(tmp_path, small_shards):
    lines = json_lines(*MANY).splitlines(keepends=True)
    bad = (0, 57, 58, 140, 199)
    for line in bad:
        lines[line] = b'{"text": "cut off\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    named = [
        name.partition(": ")[0]
        for name in prepare_here(files(tmp_path), ByteTokenizer()).sources.popitem()[1].record.named
    ]
    assert named == [f"{tmp_path / 'a.jsonl'} line {line + 1}" for line in bad]


def test_row_groups_of_long_tables_are_cut_and_files_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SHARD_BYTES", 1500)
    (tmp_path / "a.txt").write_text("before")
    rows = [f"{i:03d}" + os.urandom(20).hex() for i in range(60)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "b.parquet", row_group_size=7)
    (tmp_path / "c.txt").write_text("behind")
    assert len(keys_of(files(tmp_path))) > 3
    assert documents_of(files(tmp_path)) == ["before", *rows, "behind"]


def test_a_change_gives_new_keys_to_few_shards(tmp_path, small_shards):
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_text(f"{i} " * 100)
    before = keys_of(files(tmp_path))
    assert len(before) > 15
    (tmp_path / "0505.txt").write_text("new")
    added = keys_of(files(tmp_path))
    assert len(set(added) - set(before)) <= 2
    (tmp_path / "0505.txt").unlink()
    assert keys_of(files(tmp_path)) == before
    (tmp_path / "070.txt").write_text("other" * 60)
    assert len(set(keys_of(files(tmp_path))) - set(before)) <= 3


def test_a_line_more_leaves_other_files_alone(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.jsonl").write_bytes(json_lines(*MANY[i * 20 : i * 20 + 20]))
    paths = [tmp_path / f"{i}.jsonl" for i in range(10)]
    config = DataConfig(sources=[{"paths": str(path)} for path in paths])
    before = keys_of(config)
    with paths[3].open("ab") as file:
        file.write(json_lines("one more"))
    after = keys_of(config)
    assert [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new] == [3]


def test_files_that_have_moved_keep_their_tokens(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(5):
        (tmp_path / "a" / f"{i}.txt").write_text(TEXTS[i])
    before = keys_of(files(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert keys_of(files(tmp_path / "b")) == before


def test_options_that_decide_on_tokens_are_part_of_the_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "body": "y"}\n')
    other = ByteTokenizer()
    other.fingerprint = "other"
    keys = [
        *keys_of(files(tmp_path)),
        *keys_of(files(tmp_path, text_column="body")),
        *keys_of(files(tmp_path, special_tokens=True)),
        *keys_of(files(tmp_path, format="text")),
        *(shard.key for shard in Preparation.of(files(tmp_path), other).shards),
    ]
    assert len(set(keys)) == 5
    assert keys_of(files(tmp_path, documents="separate", shuffle_seed=3, cut_documents=9, damaged="stop")) == keys[:1]


def test_megatron_reads_the_documents(tmp_path, small_shards):
    (tmp_path / "a.jsonl").write_bytes(json_lines("one", "", "three ✓") + b"{\n" + json_lines(*MANY))
    config = files(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    prepare_here(config, ByteTokenizer())
    found = []
    for prefix in prefixes_of(config):
        dataset = IndexedDataset(prefix)
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
        found += [dataset[i].tolist() for i in range(len(dataset))]
    expected = [[*text.encode(), END] if text else [] for text in ("one", "", "three ✓", "", *MANY)]
    assert found == expected


def write_dataset(prefix: Path, texts: list[str], *, ends: list[bool]) -> None:
    """A dataset as Megatron-core's own tools write it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(257))
    for text, end in zip(texts, ends, strict=True):
        tokens = [*text.encode(), *[END] * end]
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("given", ["tokens", "tokens.bin", "tokens.idx"])
def test_datasets_of_megatron_are_read(tmp_path, end, given):
    write_dataset(tmp_path / "tokens", TEXTS, ends=[end] * len(TEXTS))
    config = DataConfig(source="megatron", paths=(str(tmp_path / given),))
    assert documents_of(config) == TEXTS
    # Sequences end anywhere: also between a document and an end that only the stream adds.
    expected = [token for text in TEXTS for token in [*text.encode(), END]]
    assert inputs(build(config.model_copy(update={"shuffle_seed": None}), length=1), 100) == expected[:400]
    stream = build(config.model_copy(update={"documents": "separate"}), length=32, batch=1)
    for _ in range(30):
        (batch,) = stream.next_step()
        assert END not in batch.tokens[batch.loss_mask]


def test_our_shards_are_datasets_of_megatron_for_another_run(tmp_path, small_shards):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*MANY))
    config = files(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    prepare_here(config, ByteTokenizer())
    assert documents_of(DataConfig(source="megatron", paths=tuple(prefixes_of(config)))) == MANY


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_datasets_that_do_not_fit_are_refused(tmp_path):
    def opened(name: str):
        return build(DataConfig(source="megatron", paths=(str(tmp_path / name),)))

    with pytest.raises(
        FileNotFoundError, match=r"none' is not the prefix of an indexed dataset: .*none\.bin is missing"
    ):
        opened("none")
    write_dataset(tmp_path / "some", TEXTS, ends=[i % 2 == 0 for i in range(len(TEXTS))])
    with pytest.raises(ValueError, match="some documents end with token 256 and some do not: append it to all"):
        opened("some")
    builder = IndexedDatasetBuilder(str(tmp_path / "sentences.bin"), dtype=np.uint16)
    builder.add_document(np.arange(10), [4, 6])
    builder.finalize(str(tmp_path / "sentences.idx"))
    with pytest.raises(ValueError, match="1 documents in 2 sequences: prepare it without splitting"):
        opened("sentences")
    write_dataset(tmp_path / "ends", [""] * 5, ends=[True] * 5)
    with pytest.raises(ValueError, match="no document of at least 2 tokens"):
        opened("ends")
    (tmp_path / "noise.bin").write_bytes(b"x" * 100)
    header = struct.Struct("<9sQBQQ")
    damaged = {
        b"y" * 100: "does not begin as an index",
        b"MMIDIDX\x00\x00": "has 9 bytes, and its header alone has 34",
        b"": "has 0 bytes",
        header.pack(b"MMIDIDX\x00\x00", 1, 77, 0, 1) + bytes(8): "tokens of the unknown type 77",
        header.pack(b"MMIDIDX\x00\x00", 1, 8, 1 << 60, 2) + bytes(50): "has 84 bytes and should have 138",
        header.pack(b"MMIDIDX\x00\x00", 1, 8, 1, 2) + bytes(28): "has 1 sequences and borders of 0",
    }
    for content, reason in damaged.items():
        (tmp_path / "noise.idx").write_bytes(content)
        with pytest.raises(ValueError, match=f"noise: not an indexed dataset of Megatron-core: .*{reason}"):
            opened("noise")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx"])
def test_cut_off_tokens_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*MANY))
    config = files(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    build(config)
    (prefix,) = prefixes_of(config)
    path = Path(prefix).with_name(name)
    for size in (path.stat().st_size - 1, 20, 0):
        os.truncate(path, size)
        with pytest.raises(ValueError, match=r"tokens.* remove its folder .* its tokens are made again") as raised:
            build(config)
        assert prefix in str(raised.value)
    shutil.rmtree(path.parent)
    assert documents_of(config) == MANY


def test_a_damaged_list_of_counts_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = files(tmp_path / "a.txt", cache=tmp_path / "cache")
    build(config)
    path = Path(prefixes_of(config)[0]).with_name("shard.json")
    for content in ("", "{}", path.read_text()[:-5]):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path.parent} is damaged .*: remove the folder"):
            build(config)


def test_tokens_that_are_removed_during_a_run_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text" * 10)
    config = files(tmp_path / "a.txt", cache=tmp_path / "cache")
    stream = build(config)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises((OSError, ValueError), match="shards"):
        stream.next_step()


@pytest.mark.parametrize("broken", ["close", "add_texts"])
def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch, broken):
    (tmp_path / "a.txt").write_text("text")
    config = files(tmp_path / "a.txt", cache=tmp_path / "cache")

    def end(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(token_shard._Writer, broken, end)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "files.json"] == []
    assert documents_of(config) == ["text"]


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = files(tmp_path / "a.txt", cache=tmp_path / "cache")
    preparation = Preparation.of(config, ByteTokenizer())
    (shard,) = preparation.shards
    folder = shard_folder(preparation.cache, shard)
    pid = os.fork()
    if not pid:
        token_shard._Writer.close = lambda *_: os._exit(3)
        prepare._write(shard, preparation.cache, ByteTokenizer(), config)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert len(list(folder.parent.iterdir())) == 1  # the unfinished one
    assert preparation.missing() == [shard]
    assert documents_of(config) == ["text"]


def test_several_writers_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*MANY))
    config = files(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        corpora = list(pool.map(lambda _: prepare_here(config, ByteTokenizer()), range(16)))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert documents_of(config) == MANY
    assert not [path for path in (tmp_path / "cache").rglob(".*") if path.is_dir()]


@pytest.mark.slow
def test_several_processes_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*MANY))
    config = files(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    script = (
        "import sys; from dash_dist.config.data import DataConfig\n"
        "from dash_dist.data.prepare import prepare_here\nfrom dash_dist.data.tokenizer import ByteTokenizer\n"
        "print(prepare_here(DataConfig.model_validate_json(sys.argv[1]), ByteTokenizer()).fingerprint)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, config.model_dump_json()]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate(timeout=200)[0] for process in processes}) == 1
    assert documents_of(config) == MANY


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["tokens", "corpus", "rename"])
def test_a_full_disk_names_the_cache(tmp_path, monkeypatch, code, where):
    (tmp_path / "a.txt").write_text("text")
    config = files(tmp_path / "a.txt", cache=tmp_path / "cache")

    def fail(*_args, **_options):
        raise OSError(code, os.strerror(code))

    if where == "tokens":
        monkeypatch.setattr(token_shard._Writer, "_flush", fail)
    elif where == "corpus":
        monkeypatch.setattr("dash_dist.data.corpus.write_json", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=f"cannot write tokens to {tmp_path / 'cache'}: .*data.cache") as raised:
        build(config)
    assert raised.value.errno == code


def test_a_cache_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match="cache"):
        build(files(tmp_path / "a.txt", cache=tmp_path / "cache"))


def test_prepared_tokens_are_not_made_again(tmp_path, tmp_path_factory, monkeypatch):
    # A cache of its own: what another process writes at the same time may replace what is remembered of a file.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    (tmp_path / "a.jsonl").write_bytes(json_lines(*MANY))
    config = files(tmp_path)
    build(config)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)
    monkeypatch.setattr(sources, "identity_of", None)  # reads samples of the raw files
    assert documents_of(config) == MANY
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(TypeError):
        build(config)


def test_neighbouring_files_share_shards_up_to_a_limit(tmp_path, small_shards):
    for i in range(50):
        (tmp_path / f"{i:02d}.txt").write_text("x" * (i * 20 + 1))
    shards = Preparation.of(files(tmp_path), ByteTokenizer()).shards
    assert all(shard.size <= 3000 for shard in shards)
    paths = [part.path for shard in shards for part in shard.parts]
    assert paths == sorted(paths)
    assert all(before.key != after.key for before, after in itertools.pairwise(shards))
