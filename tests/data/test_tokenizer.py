"""Tokenizers: bytes, and those of the tokenizers and transformers libraries, built here."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from dash_dist.data.tokenizer import ByteTokenizer, _SlowTokenizer, load_tokenizer
from tests.data.data_streams import build, files, inputs, json_lines

TEXT = "def façade(x):\n    return x ✓\n" * 20


def encode(tokenizer, text: str) -> np.ndarray:
    (tokens,) = tokenizer.encode_batch([text])
    return tokens


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
    tokens = encode(tokenizer, "é!")
    assert tokens.tolist() == [0xC3, 0xA9, 0x21]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([*tokens, 256, 0xC3]) == "é!\ufffd"


@pytest.mark.parametrize("kind", ["tokenizer_file", "tokenizer_folder"])
def test_tokenizers_by_path(request, kind):
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    tokens = encode(tokenizer, TEXT)
    assert len(tokens) < len(TEXT)
    assert isinstance(tokens, np.ndarray)
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size
    assert tokenizer.end_of_document == 1
    assert tokenizer.end_of_document not in tokens
    assert tokenizer.decode([*tokens, tokenizer.end_of_document]) == TEXT


@pytest.mark.parametrize("kind", ["tokenizer_file", "tokenizer_folder"])
def test_documents_packed_with_a_tokenizer_by_path(request, kind, corpus):
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    texts = [TEXT, TEXT[:50]]
    stream = build(corpus("text", texts, shuffle_seed=None), length=16, batch=2, tokenizer=tokenizer)
    expected = [token for text in texts for token in [*encode(tokenizer, text), tokenizer.end_of_document]]
    assert inputs(stream, 20) == (expected * 10)[: 20 * 32]


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
    plain = encode(load_tokenizer(str(tokenizer_file)), TEXT)
    limited = Tokenizer.from_file(str(tokenizer_file))
    limited.enable_truncation(4)
    limited.enable_padding(length=10_000)
    limited.save(str(tokenizer_file))
    np.testing.assert_array_equal(encode(load_tokenizer(str(tokenizer_file)), TEXT), plain)


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


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("<s> $A", [0], []), ("<s> $A </s>", [0], []), ("<s> <s> $A <mid>", [0, 0], [2]), ("$A", [], [])],
)
def test_special_tokens_of_the_post_processor_are_put_around_documents(tmp_path, template, before, after):
    special = ["<s>", "</s>", "<mid>"]
    fast = trained(*special)
    fast.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, number) for number, token in enumerate(special)]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), end_of_document="</s>")
    assert tokenizer.special_tokens == (tuple(before), tuple(after) or ((1,) if "</s>" in template else ()))
    # Long enough to be tokenised in pieces, and an empty one, which stays empty.
    texts = [TEXT, "", "short", TEXT * 1500]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*texts))
    for special_tokens in (True, False):
        config = files(tmp_path / "a.jsonl", shuffle_seed=None, special_tokens=special_tokens)
        expected = []
        for text in (texts[0], texts[2], texts[3]):
            tokens = encode(tokenizer, text).tolist()
            expected += [*before, *tokens, *after, 1] if special_tokens else [*tokens, 1]
        stream = build(config, length=len(expected), batch=1, tokenizer=tokenizer)
        assert inputs(stream, 1) == expected
        assert stream._sources[0].record.empty == 1


def test_texts_of_special_tokens_in_documents_are_those_tokens(tokenizer_file):
    """As the tokenizer's own file says; also where the document is long."""
    tokenizer = load_tokenizer(str(tokenizer_file))
    text = TEXT + "<|endoftext|>" + TEXT
    assert (encode(tokenizer, text) == tokenizer.end_of_document).sum() == 1
    pieces = [text * 300, text * 300]
    found = np.concatenate(list(tokenizer.encode_pieces(pieces)))
    np.testing.assert_array_equal(found, encode(tokenizer, text * 600))


class SlowTokenizer(PreTrainedTokenizer):
    """One of `transformers` that is written in Python."""

    def __init__(self, **options):
        self._letters = ["</s>", *"abcdefghijklmnopqrstuvwxyz "]
        super().__init__(eos_token="</s>", **options)

    @property
    def vocab_size(self):
        return len(self._letters)

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self._letters)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._letters.index(token)

    def _convert_id_to_token(self, index):
        return self._letters[index]


def test_tokenizers_written_in_python():
    tokenizer = _SlowTokenizer(SlowTokenizer(), 0, None)
    assert encode(tokenizer, "abc").tolist() == [1, 2, 3]
    assert np.concatenate(list(tokenizer.encode_pieces(["ab", "c"]))).tolist() == [1, 2, 3]
    assert tokenizer.vocab_size == 28
    ids, before = tokenizer.encode_cut("abc", [0, 2, 3])
    assert (ids.tolist(), before) == ([1, 2, 3], [0, 2, 3])
