"""Tokenizers: bytes, and those of the tokenizers and transformers libraries, built here."""

import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dash_dist.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.data.data_streams import build, steps

TEXT = "def façade(x):\n    return x ✓\n" * 20


def trained(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture
def tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    trained("<pad>", "<|endoftext|>").save(str(path))
    return path


@pytest.fixture
def tokenizer_folder(tmp_path):
    fast = PreTrainedTokenizerFast(tokenizer_object=trained("<pad>", "<stop>"), eos_token="<stop>", pad_token="<pad>")
    fast.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode("é!")
    assert tokens.tolist() == [0xC3, 0xA9, 0x21]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([*tokens, 256, 0xC3]) == "é!\ufffd"


@pytest.mark.parametrize("kind", ["tokenizer_file", "tokenizer_folder"])
def test_tokenizers_by_path(request, kind):
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) < len(TEXT)
    assert isinstance(tokens, np.ndarray)
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size
    assert tokenizer.end_of_document == 1
    assert tokenizer.end_of_document not in tokens
    assert tokenizer.decode([*tokens, tokenizer.end_of_document]) == TEXT


@pytest.mark.parametrize("kind", ["tokenizer_file", "tokenizer_folder"])
def test_documents_packed_with_a_tokenizer_by_path(request, kind, corpus):
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    stream = build(corpus("text", [TEXT, TEXT[:50]]), length=16, batch=2, tokenizer=tokenizer)
    first = [window[0, :-1].tolist() for window in steps(stream, 4)]
    assert list(itertools.chain(*first)) == tokenizer.encode(TEXT)[:64].tolist()


def test_end_of_document_by_name_and_from_tokenizer_config(tokenizer_file):
    assert load_tokenizer(str(tokenizer_file), end_of_document="<pad>").end_of_document == 0
    settings = tokenizer_file.with_name("tokenizer_config.json")
    for eos in ("<pad>", {"content": "<pad>"}):
        settings.write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(str(tokenizer_file)).end_of_document == 0
    with pytest.raises(ValueError, match=r"'<none>' is not one of its 280 tokens: set data\.end_of_document"):
        load_tokenizer(str(tokenizer_file), end_of_document="<none>")


@pytest.mark.parametrize(("special", "found"), [((), "has none"), (("</s>", "<eos>"), "has several .* </s>, <eos>")])
def test_no_end_of_document_token(tmp_path, special, found):
    trained(*special).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=f"{found}: set data.end_of_document"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_truncation_and_padding_of_the_file_are_not_applied_to_documents(tokenizer_file):
    plain = load_tokenizer(str(tokenizer_file)).encode(TEXT)
    limited = Tokenizer.from_file(str(tokenizer_file))
    limited.enable_truncation(4)
    limited.enable_padding(length=10_000)
    limited.save(str(tokenizer_file))
    np.testing.assert_array_equal(load_tokenizer(str(tokenizer_file)).encode(TEXT), plain)


def test_fingerprints_tell_tokenizers_apart(tokenizer_file, tokenizer_folder):
    prints = [
        load_tokenizer(str(tokenizer_file)).fingerprint,
        load_tokenizer(str(tokenizer_file), end_of_document="<pad>").fingerprint,
        load_tokenizer(str(tokenizer_folder)).fingerprint,
        ByteTokenizer().fingerprint,
    ]
    assert len(set(prints)) == 4
    assert load_tokenizer(str(tokenizer_file)).fingerprint == prints[0]


def test_paths_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_tokenizer(str(tmp_path / "empty"))
