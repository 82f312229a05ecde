"""The preparation of a corpus by several processes, and by the ranks of a run."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dash_dist.data.prepare import Preparation, cache_folder, prepare_here, prepare_in_processes, start_worker
from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.data_streams import documents_of, files, json_lines
from tests.support.ranks import run_ranks

JOB = "tests.data.preparing_ranks:prepare_at_each_rank"
TEXTS = [f"document {i}" for i in range(60)]


@pytest.fixture
def config(tmp_path):
    """A source of several shards: files of different formats do not share one, nor do sources."""
    sources = []
    for part in range(6):
        path = tmp_path / "data" / f"{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(json_lines(*TEXTS[part * 10 : part * 10 + 10]))
        sources.append({"paths": [str(path)], "label": str(part)})
    return {"sources": sources}


def caches_of(tmp_path: Path, *names: str) -> list[str]:
    return [str(tmp_path / "caches" / name) for name in names]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_each_shard_once(tmp_path, config, size):
    results = run_ranks(JOB, size, config, caches_of(tmp_path, *["one"] * size), list(range(size)), cpu_only=True)
    written = [key for result in results for key in result["written"]]
    assert len(written) == len(set(written)) == 6
    assert all(len(result["written"]) == 6 // size for result in results)
    assert all(result["again"] == [] and result["same"] and result["inside"] for result in results)
    assert len({result["fingerprint"] for result in results}) == 1
    assert all(result["beats"] > 0 and result["documents"] == [10] * 6 for result in results)


def test_nodes_without_shared_storage_write_what_they_miss(tmp_path, config):
    # The first node has two ranks.
    caches = caches_of(tmp_path, "a", "a", "b")
    results = run_ranks(JOB, 3, config, caches, [0, 1, 0], cpu_only=True)
    assert all(result["again"] == [] and result["same"] and result["inside"] for result in results)
    assert len({result["fingerprint"] for result in results}) == 1
    for cache in set(caches):
        found = list(Path(cache).glob("dash-dist/data/shards/*/*/shard.json"))
        assert len(found) == 6
    assert sum(len(result["written"]) for result in results) == 12


def test_nodes_that_lead_into_one_cache_agree(tmp_path, config):
    results = run_ranks(JOB, 2, config, caches_of(tmp_path, "one", "one"), [0, 0], cpu_only=True)
    assert all(result["same"] for result in results)
    assert sum(len(result["written"]) for result in results) == 6


@pytest.mark.parametrize("bad", [0, 5])
def test_damage_stops_every_rank(tmp_path, config, bad):
    path = tmp_path / "data" / f"{bad}.jsonl"
    path.write_bytes(path.read_bytes() + b"{\n")
    stopping = {**config, "damaged": "stop"}
    results = run_ranks(JOB, 2, stopping, caches_of(tmp_path, "one", "one"), [0, 1], cpu_only=True)
    for result in results:
        assert result["error"].startswith(f"cannot prepare the data: {path} line 11: not JSON")
    # Where damage is skipped, every rank knows of the place.
    results = run_ranks(JOB, 2, config, caches_of(tmp_path, "one", "one"), [0, 1], cpu_only=True)
    assert all(sorted(result["documents"]) == [10] * 5 + [11] for result in results)


def test_a_missing_file_stops_every_rank(tmp_path, config):
    path = tmp_path / "data" / "3.jsonl"
    path.unlink()
    results = run_ranks(JOB, 2, config, caches_of(tmp_path, "a", "b"), [0, 0], cpu_only=True)
    for result in results:
        assert result["error"].startswith("cannot prepare the data: data.paths:")
        assert str(path) in result["error"]


def test_processes_prepare_what_is_missing(tmp_path):
    for part in range(4):
        (tmp_path / f"{part}.jsonl").write_bytes(json_lines(*TEXTS[part * 15 : part * 15 + 15]))
    config = files(tmp_path / "*.jsonl", cache=tmp_path / "cache")
    preparation = Preparation.of(config, ByteTokenizer())
    done: list[tuple[str, int]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=start_worker, initargs=(config,)) as pool:
        corpus = prepare_in_processes(preparation, pool, lambda shard, tokens: done.append((shard.key, tokens)))
        assert sorted(key for key, _ in done) == sorted(shard.key for shard in preparation.shards)
        assert sum(tokens for _, tokens in done) == sum(len(text) + 1 for text in TEXTS)
        assert documents_of(config) == TEXTS
        assert prepare_here(config, ByteTokenizer()).fingerprint == corpus.fingerprint
        done.clear()
        prepare_in_processes(preparation, pool, lambda shard, tokens: done.append((shard.key, tokens)))
        assert done == []
        (tmp_path / "1.jsonl").write_bytes(b"{\n")
        stopping = config.model_copy(update={"damaged": "stop", "cache": tmp_path / "other"})
        with pytest.raises(ValueError, match=r"1\.jsonl line 1: not JSON"):
            prepare_in_processes(Preparation.of(stopping, ByteTokenizer()), pool)


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    assert cache_folder(files("a", cache=tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert cache_folder(files("a", cache="here")) == tmp_path / "here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(files("a")) == tmp_path / "xdg" / "dash-dist" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(files("a")) == tmp_path / ".cache" / "dash-dist" / "data"


def test_tests_leave_the_users_cache_alone():
    assert "dash-dist-cache-" in os.environ["XDG_CACHE_HOME"]
