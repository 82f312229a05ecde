"""Batches and the position in the data: the same global batches whatever the ranks, and after any stop."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from dash_dist.data.stream import merge_states
from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.data_streams import CHUNK_SIZE, TEXTS, build, join, join_all, steps

FORMATS = ("text", "jsonl", "parquet", "hub")


def saved(*streams):
    """What a checkpoint would hold."""
    return json.loads(json.dumps(merge_states(stream.state_dict() for stream in streams)))


def expected_row(texts: list[str], tokens: int) -> list[int]:
    epoch = [token for text in texts for token in [*text.encode(), 256]]
    return (epoch * (tokens // len(epoch) + 1))[:tokens]


@pytest.mark.parametrize("file_format", FORMATS)
def test_each_row_reads_its_own_documents_over_and_over(corpus, file_format):
    windows = steps(build(corpus(file_format)), 40)
    inputs = torch.cat([window[:, :-1] for window in windows], dim=1)
    for row in range(4):
        assert inputs[row].tolist() == expected_row(TEXTS[row::4], inputs.shape[1])
    for before, after in itertools.pairwise(windows):
        assert torch.equal(before[:, -1], after[:, 0])


def test_batch_shapes_and_dtypes(corpus):
    batches = build(corpus("text"), length=8, batch=4, size=1, micro=2).next_step()
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (2, 8)
        assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert batch.loss_mask.dtype == torch.bool
        assert bool(batch.loss_mask.all())
        assert batch.cu_seqlens is None
        assert batch.document_length == 8


def test_separate_documents_come_with_their_borders(corpus):
    config = corpus("text", ["a" * 5, "b" * 4, "c" * 20], documents="separate")
    (first,) = build(config, batch=1).next_step()
    assert first.tokens.shape == first.labels.shape == first.loss_mask.shape == (1, 16)
    assert (first.cu_seqlens.dtype, first.cu_seqlens.device.type) == (torch.int32, "cpu")
    assert first.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert first.loss_mask[0].nonzero().flatten().tolist() == [*range(5), *range(8, 16)]
    assert first.labels[0, [4, 11, 15]].tolist() == [256, 256, ord("c")]
    assert first.document_length == (8 * 8 + 4 * 4 + 4 * 4) / 16


@pytest.mark.parametrize(
    ("file_format", "shuffle_seed", "documents"),
    [
        *((file_format, None, "joined") for file_format in FORMATS),
        ("text", 7, "joined"),
        ("jsonl", 7, "separate"),
        ("parquet", 7, "joined"),
        ("hub", None, "separate"),
    ],
)
def test_resume_is_exact_at_every_step_across_epochs(corpus, file_format, shuffle_seed, documents):
    # 12 steps of 16 tokens: the shortest row repeats its documents several times, the longest is inside 200
    # bytes.
    config = corpus(file_format, shuffle_seed=shuffle_seed, documents=documents)
    stream = build(config)
    expected, states = [], [saved(stream)]
    for _ in range(12):
        expected.append(join_all(stream.next_step()))
        states.append(saved(stream))
    epochs = {row["position"]["epoch"] for row in states[-1]["rows"].values()}
    assert max(epochs) >= 1
    assert any(row["offset"] > 100 for state in states for row in state["rows"].values())
    for step, state in enumerate(states):
        resumed = build(config)
        resumed.load_state_dict(state)
        for rows in expected[step:]:
            assert join_all(resumed.next_step()) == rows
        assert resumed.skipped_documents == stream.skipped_documents
    # A run that is stopped after every step: each position is taken by a stream that was itself resumed.
    state = states[0]
    for rows in expected:
        resumed = build(config)
        resumed.load_state_dict(state)
        assert saved(resumed) == state
        assert join_all(resumed.next_step()) == rows
        state = saved(resumed)


@pytest.mark.parametrize("file_format", FORMATS)
def test_data_parallel_ranks_share_out_the_same_global_batch(corpus, file_format):
    config = corpus(file_format)
    whole = steps(build(config), 5)
    for size, micro in ((1, 4), (2, 1), (2, 2), (4, 1)):
        ranks = [steps(build(config, rank=rank, size=size, micro=micro), 5) for rank in range(size)]
        for step, window in enumerate(whole):
            assert torch.equal(torch.cat([rank[step] for rank in ranks]), window)


@pytest.mark.parametrize(
    ("documents", "sizes"),
    [("joined", ((2, 1), (4, 1), (1, 4), (2, 2))), ("separate", ((2, 1), (4, 1), (1, 1), (2, 1)))],
)
def test_resume_at_other_data_parallel_sizes(corpus, documents, sizes):
    config = corpus("jsonl", documents=documents)
    stream = build(config)
    undisturbed = [join_all(stream.next_step()) for _ in range(12)]
    position, at = None, 0
    for size, micro in sizes:
        streams = [build(config, rank=rank, size=size, micro=micro) for rank in range(size)]
        for stream in streams if position else []:
            stream.load_state_dict(position)
        for _ in range(3):
            together = [row for stream in streams for row in join_all(stream.next_step())]
            assert together == undisturbed[at]
            at += 1
        # Ranks that share a data-parallel index save the same rows, and the order does not matter.
        position = saved(*reversed(streams), streams[0])


def test_shuffling_reorders_the_files_of_each_epoch(corpus):
    texts = [chr(ord("a") + i) for i in range(20)]
    stream = build(corpus("text", texts, shuffle_seed=3), length=40, batch=1)
    first, second = (bytes(step[0, :-1:2].tolist()).decode() for step in steps(stream, 2))
    assert sorted(first) == sorted(second) == texts
    assert len({first, second, "".join(texts)}) == 3


def test_the_position_stays_small_inside_a_long_document(corpus):
    stream = build(corpus("text", ["x" * 3_000_000, "y" * 3_000_000]), length=1024, batch=2)
    for _ in range(50):
        stream.next_step()
    assert len(json.dumps(stream.state_dict())) < 2000


@pytest.mark.slow
def test_batches_do_not_depend_on_the_hash_seed(corpus):
    config = corpus("text", shuffle_seed=1)
    script = (
        "import sys, json; from dash_dist.config.data import DataConfig\n"
        "from dash_dist.data.stream import *\nfrom dash_dist.data.tokenizer import *\n"
        "s = build_data_stream(DataConfig.model_validate_json(sys.argv[1]), tokenizer=ByteTokenizer(),\n"
        "    sequence_length=16, global_batch_size=2, dp_rank=0, dp_size=1, micro_batch_size=2, chunk_size=16)\n"
        "b = [s.next_step()[0].tokens.tolist() for _ in range(5)]; print(json.dumps([b, s.state_dict()]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, config.model_dump_json()],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert json.loads(outputs[0]) == json.loads(outputs[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 8}, "global_batch_size 4, this run has 8"),
        ({"length": 32}, "sequence_length 16, this run has 32"),
        ({"tokenizer": "other"}, "tokenizer bytes, this run has other"),
    ],
)
def test_a_position_in_other_data_is_refused(corpus, change, message):
    config = corpus("text")
    state = saved(build(config))
    if "tokenizer" in change:
        change = {"tokenizer": ByteTokenizer()}
        change["tokenizer"].fingerprint = "other"
    with pytest.raises(ValueError, match=message):
        build(config, **change).load_state_dict(state)


def test_a_position_saved_before_documents_could_be_separate_is_one_in_joined_documents(corpus):
    config = corpus("text")
    stream = build(config)
    stream.next_step()
    state = saved(stream)
    del state["documents"]
    resumed = build(config)
    resumed.load_state_dict(state)
    assert join_all(resumed.next_step()) == join_all(stream.next_step())
    with pytest.raises(ValueError, match="documents joined, this run has separate"):
        build(config.model_copy(update={"documents": "separate"})).load_state_dict(state)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_position_in_a_changed_corpus_is_refused(corpus, tmp_path, file_format):
    config = corpus(file_format)
    state = saved(build(config))
    first, second, *_ = sorted((tmp_path / file_format).iterdir())
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="position in the data was saved with corpus"):
        build(config).load_state_dict(state)


def test_a_moved_corpus_is_the_same_corpus(corpus, tmp_path):
    config = corpus("jsonl")
    stream = build(config)
    stream.next_step()
    state = saved(stream)
    (tmp_path / "jsonl").rename(tmp_path / "elsewhere")
    resumed = build(config.model_copy(update={"paths": (str(tmp_path / "elsewhere"),)}))
    resumed.load_state_dict(state)
    (tmp_path / "elsewhere").rename(tmp_path / "jsonl")
    expected = join(stream.next_step())
    (tmp_path / "jsonl").rename(tmp_path / "elsewhere")
    assert torch.equal(join(resumed.next_step()), expected)


def test_states_that_do_not_belong_together_are_not_merged(corpus):
    config = corpus("text")
    ranks = [build(config, rank=rank, size=2) for rank in range(2)]
    with pytest.raises(ValueError, match=r"rows \[2, 3\] of the global batch are in none of the 1 states"):
        merge_states([ranks[0].state_dict()])
    with pytest.raises(ValueError, match=r"no position for rows \[2, 3\]"):
        ranks[1].load_state_dict(ranks[0].state_dict())
    early = ranks[0].state_dict()
    ranks[0].next_step()
    with pytest.raises(ValueError, match="disagree about row 0"):
        merge_states([early, ranks[0].state_dict(), ranks[1].state_dict()])
    with pytest.raises(ValueError, match="ranks disagree about sequence_length: 16 and 8"):
        merge_states([ranks[0].state_dict(), build(config, length=8).state_dict()])
    with pytest.raises(ValueError, match="no states"):
        merge_states([])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 6, "size": 2, "micro": 2}, "6 is not a multiple .* 2 x 2: use 8"),
        ({"rank": 2, "size": 2}, r"dp_rank 2 is not in \[0, dp_size=2\)"),
        ({"length": 0}, "sequence_length is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(corpus, sizes, message):
    with pytest.raises(ValueError, match=message):
        build(corpus("text"), **sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"micro": 2}, "set training.micro_batch_size to 1, or data.documents to joined"),
        ({"length": 18}, f"18 is not a multiple of attention.chunk_size = {CHUNK_SIZE}, .* to 20"),
    ],
)
def test_sizes_that_separate_documents_cannot_have_are_refused(corpus, sizes, message):
    with pytest.raises(ValueError, match=message):
        build(corpus("text", documents="separate"), **sizes)
