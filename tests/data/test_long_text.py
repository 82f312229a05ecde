"""A long text, tokenised in pieces, has the tokens of the whole."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_dist.data import long_text
from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tests.data.tokenizers_of_tests import KINDS, mixed_text, save
from tests.support.cases import exhaustive


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_tokenizer(str(save(kind, folder / f"{kind}.json"))) for kind in KINDS}


def cut(text: str, seed: int, longest: int) -> list[str]:
    """The text in pieces as a reader gives them, of any length."""
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.randrange(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def in_pieces(tokenizer: Tokenizer, pieces: list[str], piece: int = 2000) -> tuple[np.ndarray, int]:
    """The tokens, and into how many jobs the text was cut."""
    jobs: list[int] = []
    encode = tokenizer._encode_with_offsets

    def counted(texts: list[str]):
        jobs.append(len(texts))
        return encode(texts)

    found = list(long_text.encode_long_text(pieces, counted, piece=piece))
    return np.concatenate(found), len(found)


def check(tokenizer: Tokenizer, text: str, *, seed: int = 0, longest: int = 3000) -> int:
    found, parts = in_pieces(tokenizer, cut(text, seed, longest))
    (whole,) = tokenizer.encode_batch([text])
    np.testing.assert_array_equal(found, whole)
    return parts


@pytest.fixture
def little_context(monkeypatch):
    """So that short texts are cut too."""
    monkeypatch.setattr(long_text, "_CONTEXT", 256)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_text(tokenizers, kind, little_context):
    parts = sum(check(tokenizers[kind], mixed_text(seed, 40_000), seed=seed) for seed in range(3))
    assert parts > 30


@pytest.mark.parametrize("kind", ["byte-level-llama3", "metaspace-first", "replaced"])
def test_mixed_text_with_the_context_of_real_runs(tokenizers, kind):
    assert check(tokenizers[kind], mixed_text(1, 100_000), longest=50_000) > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        " " * 30_000,
        "\n" * 30_000,
        "0123456789" * 3000,
        "a" * 30_000,
        "word" * 5000 + " and " + "\n" * 9999 + "x" * 5000,
        ("one line without an end " * 1500),
        "日本語" * 8000,
        "😀" * 8000,
        ("a" + " " * 3001) * 8,
        ("12345\n" + "\n" * 2999) * 8,
        "e" + "\u0301" * 3000 + " a" * 5000,
        "x" * 6000 + " y" * 6000,
    ],
    ids=str,
)
def test_texts_with_few_places_to_cut_at(tokenizers, kind, text, little_context):
    check(tokenizers[kind], text)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    parts=st.lists(
        st.tuples(
            st.sampled_from(
                [" ", "\n", "a", "word ", "0", "1234567890", "é", "日", " \n", "\u0301", "<s>", "def f():\n"]
            )
            | st.text(max_size=8),
            st.integers(1, 400),
        ),
        min_size=1,
        max_size=30,
    ),
    seed=st.integers(0, 100),
)
def test_any_text(tokenizers, kind, parts, seed):
    text = "".join(part * count for part, count in parts)
    context, long_text._CONTEXT = long_text._CONTEXT, 256
    try:
        if text:
            check(tokenizers[kind], text, seed=seed)
    finally:
        long_text._CONTEXT = context


def test_bytes():
    text = mixed_text(0, 20_000)
    found = np.concatenate(list(ByteTokenizer().encode_pieces(cut(text, 0, 500))))
    assert found.tobytes() == text.encode()


MEASURE = """
import resource, sys
from pathlib import Path
from dash_dist.config.data import DataConfig
from dash_dist.data.prepare import prepare_here
from dash_dist.data.tokenizer import load_tokenizer

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder, spec = Path(sys.argv[1]), sys.argv[2]
tokenizer = load_tokenizer(spec)
def prepare(name):
    config = DataConfig(source="files", paths=str(folder / name), cache=folder / "cache", tokenizer=spec)
    return prepare_here(config, tokenizer)
prepare("small.txt")
before = peak()
corpus = prepare("long.txt")
(source,) = corpus.sources.values()
print(peak() - before, source.record.tokens)
"""


SIZES_AND_LIMITS = {"bytes": (64_000_000, 100), "byte-level": (24_000_000, 400)}  # bytes, MiB


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", exhaustive(SIZES_AND_LIMITS, ["byte-level"]))
def test_memory_does_not_grow_with_a_document(tmp_path, kind):
    """tokenizers_of_users.py: a document of 32 MB took 5.5 GB."""
    size, limit = SIZES_AND_LIMITS[kind]
    spec = "bytes" if kind == "bytes" else str(save(kind, tmp_path / "tokenizer.json"))
    text = mixed_text(0, 1_000_000)
    (tmp_path / "small.txt").write_text(text)
    (tmp_path / "long.txt").write_text(text * (size // len(text.encode()) + 1))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path), spec],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    grown, tokens = result.stdout.split()
    assert float(grown) < limit, f"{grown} MB more for a document of {size} bytes"
    assert int(tokens) > size // 7


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_the_tokens_before_a_cut_are_those_of_the_text_that_ends_there(tokenizers, kind):
    tokenizer = tokenizers.get(kind) or ByteTokenizer()
    exact = 0
    for seed, length in ((0, 300), (1, 1500), (2, 12_000)):
        text = mixed_text(seed, length)
        cuts = sorted(random.Random(seed).sample(range(len(text) + 1), 40))
        ids, counts = tokenizer.encode_cut(text, cuts)
        np.testing.assert_array_equal(ids, tokenizer.encode_batch([text])[0])
        for end, count in zip(cuts, counts, strict=True):
            (alone,) = tokenizer.encode_batch([text[:end]])
            if count is not None:
                exact += 1
                np.testing.assert_array_equal(alone, ids[:count])
    assert exact > 40  # others are in the middle of a word
