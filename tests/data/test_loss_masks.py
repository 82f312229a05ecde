"""Sequences of rows of which a part counts in the loss: positions, pieces, counts, and batches without any."""

import numpy as np
import pytest

from dash_dist.config.data import DataConfig
from dash_dist.data.loss_spans import LossSpans, SpanWriter
from tests.data.chat_templates import lines_of
from tests.data.data_streams import END, build, build_ranks, files, global_steps, resume, saved


def completions(path, *pairs: tuple[str, str], **options) -> DataConfig:
    path.write_bytes(lines_of(*({"prompt": prompt, "completion": completion} for prompt, completion in pairs)))
    return files(path, rows="completions", shuffle_seed=None, **options)


def counted(step: list) -> list[tuple[int, int]]:
    """Input and label wherever the label counts."""
    triples = [triple for row in step for triple in zip(*row[:3], strict=True)]
    return [(token, label) for token, label, counts in triples if counts]


@pytest.mark.parametrize("length", [4, 8, 12, 64])
@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_each_token_that_counts_is_a_label_that_counts_wherever_documents_are_cut(tmp_path, documents, length):
    pairs = [("prompt", "ab"), ("x" * 17, "cdefghi"), ("", "j"), ("y" * 30, ""), ("zz", "k" * 20)]
    lookahead = {"lookahead": 1} if documents == "separate" else {}
    config = completions(tmp_path / "a.jsonl", *pairs, documents=documents, **lookahead)
    stream = build(config, length=length, batch=2)
    found: list[int] = []
    while (state := saved(stream)["sources"][0])["epoch"] < 3:
        for step in global_steps([stream], 1):
            found += [label for _, label in counted(step)]
    expected = [token for _, completion in pairs for token in [*completion.encode(), END]]
    if documents == "separate":
        expected.remove(ord("j"))  # the first token of a document has none before it
    assert found == (expected * 5)[: len(found)]
    assert len(found) > 2 * len(expected)
    assert state["loss_tokens"] == len(found)
    assert stream.progress.popitem()[1].loss_tokens == len(found)


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_batch_without_a_token_that_counts_is_passed_over_at_every_rank(tmp_path, documents):
    config = completions(tmp_path / "a.jsonl", ("p" * 300, "answer"), ("q" * 70, "b"), documents=documents)
    if documents == "separate":
        config = config.model_copy(update={"lookahead": 1})
    alone = build(config, batch=2)
    states, whole = [], []
    for _ in range(6):
        states.append(saved(alone))
        whole += global_steps([alone], 1)
    assert all(counted(step) for step in whole)
    assert any(not counted([row]) for step in whole for row in step)  # a sequence alone may have none
    assert alone.step_tokens == sum(len(row[0]) for row in whole[-1]) or documents == "separate"
    assert sum(one.tokens for one in alone.progress.values()) <= 6 * 32
    assert states[1]["sources"][0]["epoch"] == 0
    for number in (1, 3, 5):
        for size in (1, 2):
            ranks = build_ranks(config, size, batch=2)
            for rank in ranks:
                assert rank.load_state_dict(states[number]) == []
            assert global_steps(ranks, 6 - number) == whole[number:]
            assert [saved(rank) for rank in ranks] == [saved(alone)] * size


def test_data_of_which_no_label_counts_is_refused(tmp_path):
    # The one token that counts is the first of its document, and no label.
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    talk = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "bcd"}]
    (tmp_path / "a.jsonl").write_bytes(lines_of({"messages": talk}))
    config = files(tmp_path / "a.jsonl", rows="messages", chat_template=tmp_path / "t.jinja", documents="separate")
    with pytest.raises(ValueError, match=r"no token of 1000 global batches of .*a\.jsonl counts in the loss: add"):
        build(config, length=4, batch=1).next_step()


def test_texts_beside_rows_count_wholly(tmp_path):
    completions(tmp_path / "a.jsonl", ("prompt", "ab"))
    (tmp_path / "b.txt").write_text("text")
    sources = [
        {"paths": str(tmp_path / "a.jsonl"), "rows": "completions", "label": "rows"},
        {"paths": str(tmp_path / "b.txt"), "label": "texts"},
    ]
    config = DataConfig(sources=sources, documents="separate", lookahead=1)
    stream = build(config, length=8, batch=2)
    steps = global_steps([stream], 4)
    progress = stream.progress
    assert progress["texts"].loss_tokens == progress["texts"].tokens > 0
    assert 3 * progress["rows"].tokens == 8 * progress["rows"].loss_tokens > 0
    assert sum(len(counted(step)) for step in steps) == sum(one.loss_tokens for one in progress.values())
    resumed, notes = resume(config, saved(stream), length=8, batch=2)
    assert (notes, resumed.progress) == ([], progress)


def test_spans_by_document_and_place(tmp_path):
    writer = SpanWriter()
    rng = np.random.default_rng(0)
    masks = [rng.random(size) < chance for size, chance in ((0, 0), (30, 0.5), (1, 1.0), (40, 0.1), (20, 0.0))]
    for mask in masks:
        borders = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
        writer.add([(start, stop) for start, stop in borders.tolist()])
    writer.close(tmp_path)
    assert writer.tokens == sum(mask.sum() for mask in masks)
    spans = LossSpans(tmp_path, len(masks))
    for number, mask in enumerate(masks):
        for start in range(len(mask) + 1):
            for stop in range(start, len(mask) + 1):
                np.testing.assert_array_equal(spans.mask(number, start, stop), mask[start:stop])
                assert spans.count(number, start, stop) == mask[start:stop].sum()
