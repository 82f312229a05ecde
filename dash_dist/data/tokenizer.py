"""From text to token ids and back.

Knows one document at a time. Does not know where documents come from or how they are packed; the
end-of-document token is named here and put after each document by the packer.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dash_dist.data.chat import ChatTemplate, template_in_settings
from dash_dist.data.long_text import EncodedText, encode_long_text, tokens_before
from dash_dist.extras import require_extra

# Texts that are an end-of-document token in every published vocabulary that has them.
_KNOWN_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """Interface of a tokenizer to the data stream."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids: every id is in [0, vocab_size)."""

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends a document."""

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they tokenise every text identically."""

    @property
    def special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the tokenizer's own post-processor puts before and after a text."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template of conversations in the tokenizer's own files."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each document, 1-d, any integer dtype, without special tokens added."""

    def encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, list[int | None]]:
        """Token ids of a text, and for each of the ascending `cuts` in its characters the number of tokens before it.

        None where the tokens before a cut are others than those of the text that ends there.
        """

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the token ids of one long document that is read in pieces, equal to those of the whole."""

    def decode(self, tokens: Any) -> str:
        """Text of a sequence of token ids; end-of-document tokens are left out."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 text, and one end-of-document token (id 256)."""

    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes"
    special_tokens: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    chat_template: ChatTemplate | None = None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """uint8 ids, one per byte; views of the encoded texts, not copies."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, list[int | None]]:
        between = (len(text[first:last].encode("utf-8")) for first, last in itertools.pairwise((0, *cuts)))
        return self.encode_batch([text])[0], list(itertools.accumulate(between))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield from self.encode_batch([piece])

    def decode(self, tokens: Any) -> str:
        """Bytes that are not UTF-8, such as a character cut at the end of a window, become U+FFFD."""
        ids = np.asarray(tokens)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class _FastTokenizer:
    """A tokenizer of the `tokenizers` library. Texts of special tokens inside a document become those tokens, as the
    tokenizer's own file says."""

    def __init__(self, tokenizer: Any, end_of_document: int, chat_template: ChatTemplate | None):
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        # One past the highest id: added tokens may leave holes.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = end_of_document
        self.fingerprint = _digest(tokenizer.to_str(), end_of_document)
        self.special_tokens = _around(
            tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a", add_special_tokens=True).ids
        )

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, list[int | None]]:
        (encoded,) = self._encode_with_offsets([text])
        return encoded.ids, tokens_before(text, encoded, cuts, self._encode_with_offsets)

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return encode_long_text(pieces, self._encode_with_offsets)

    def _encode_with_offsets(self, texts: list[str]) -> list[EncodedText]:
        return [
            EncodedText(
                np.asarray(encoding.ids, dtype=np.int32), np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            )
            for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ]

    def decode(self, tokens: Any) -> str:
        return self._tokenizer.decode(_ids_without(tokens, self.end_of_document), skip_special_tokens=False)


class _SlowTokenizer:
    """A tokenizer of `transformers` written in Python, without a `tokenizers` backend."""

    def __init__(self, tokenizer: Any, end_of_document: int, chat_template: ChatTemplate | None):
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = end_of_document
        self.fingerprint = _digest(type(tokenizer).__name__ + json.dumps(vocabulary, sort_keys=True), end_of_document)
        self.special_tokens = _around(
            tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a", add_special_tokens=True)
        )

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        # verbose=False: a document longer than the model's context is normal here, not worth a warning.
        return [
            np.asarray(self._tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int32)
            for text in texts
        ]

    def encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, list[int | None]]:
        ids, *before = self.encode_batch([text, *(text[:cut] for cut in cuts)])
        return ids, [len(one) if np.array_equal(one, ids[: len(one)]) else None for one in before]

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode the whole text at once: these tokenizers tell no offsets to cut by."""
        return iter(self.encode_batch(["".join(pieces)]))

    def decode(self, tokens: Any) -> str:
        return self._tokenizer.decode(_ids_without(tokens, self.end_of_document))


def load_tokenizer(spec: str, *, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names; nothing is downloaded.

    spec: "bytes", a tokenizer.json of the `tokenizers` library, or a folder that
    `transformers.AutoTokenizer` loads. end_of_document: text of the token that ends a document. None takes
    the eos_token of the tokenizer's own files, else the one well-known end-of-text token in its vocabulary.

    Raises FileNotFoundError for a path that is not there, ValueError for files that are no tokenizer and
    for a tokenizer without an end-of-document token, ConfigError without the extra `hub`.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path, end_of_document)
    if path.is_file():
        return _load_file(path, end_of_document)
    raise FileNotFoundError(
        f"tokenizer {spec!r}: no such file or folder (looked at {path.absolute()}): give 'bytes', a tokenizer.json, "
        "or a folder saved by transformers"
    )


def _load_file(path: Path, end_of_document: str | None) -> Tokenizer:
    require_extra("hub", f"tokenizer {path}")
    from tokenizers import Tokenizer as FastTokenizer

    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of bad file
        raise ValueError(f"tokenizer {path}: not a tokenizer.json of the tokenizers library: {error}") from error
    # Padding and truncation settings belong to a model's batches; here they would change documents silently.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    beside = path.with_name("tokenizer_config.json")
    settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    named = end_of_document
    if named is None:
        eos = settings.get("eos_token")
        named = eos.get("content") if isinstance(eos, dict) else eos
    template = path.with_name("chat_template.jinja")
    if template.is_file():
        settings = {**settings, "chat_template": template.read_text(encoding="utf-8")}
    end_id = _end_id(str(path), named, tokenizer.get_vocab(with_added_tokens=True))
    return _FastTokenizer(tokenizer, end_id, template_in_settings(f"tokenizer {path}", settings))


def _load_folder(path: Path, end_of_document: str | None) -> Tokenizer:
    require_extra("hub", f"tokenizer {path}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer folder {path}: transformers cannot load it: {error}") from error
    named = end_of_document if end_of_document is not None else tokenizer.eos_token
    end_id = _end_id(str(path), named, tokenizer.get_vocab())
    settings = {**tokenizer.special_tokens_map, "chat_template": tokenizer.chat_template}
    template = template_in_settings(f"tokenizer {path}", settings)
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return _FastTokenizer(backend, end_id, template)
    return _SlowTokenizer(tokenizer, end_id, template)


def _end_id(source: str, named: str | None, vocabulary: dict[str, int]) -> int:
    if named is not None:
        if named not in vocabulary:
            raise ValueError(
                f"tokenizer {source}: end-of-document token {named!r} is not one of its {len(vocabulary)} tokens: "
                "set data.end_of_document to the text of a token it has"
            )
        return vocabulary[named]
    known = [token for token in _KNOWN_END_OF_DOCUMENT if token in vocabulary]
    if len(known) == 1:
        return vocabulary[known[0]]
    found = f"has several that could be it, {', '.join(known)}" if known else "has none"
    raise ValueError(
        f"tokenizer {source}: no end-of-document token is named in its files and its vocabulary {found}: "
        "set data.end_of_document to the text of the token that ends a document"
    )


def _around(plain: list[int], with_special: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of `with_special` before and after those of `plain`."""
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return tuple(with_special[:start]), tuple(with_special[start + len(plain) :])
    raise ValueError(f"the tokenizer's post-processor changes tokens: {plain} becomes {with_special}")


def _ids_without(tokens: Any, end_of_document: int) -> list[int]:
    ids = np.asarray(tokens)
    return ids[ids != end_of_document].tolist()


def _digest(description: str, end_of_document: int) -> str:
    return hashlib.sha256(f"{end_of_document}:{description}".encode()).hexdigest()[:16]
