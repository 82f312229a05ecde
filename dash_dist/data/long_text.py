"""The tokens of a long text, piece by piece, equal to those of the whole.

Knows texts and encodings with offsets; does not know tokenizers' kinds. A text is cut where the tokens on both sides do
not depend on what lies further away: a part that ends soon after the cut and a part that begins soon before it must
agree on the tokens around it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_PIECE = 1 << 18
_CONTEXT = 1 << 11
_NEAR = 1 << 8
"""Characters before a cut whose tokens must be those of the text that ends there. A difference begins at the cut."""
_TRIES = 16
_AT_ONCE = 16


@dataclass(frozen=True)
class EncodedText:
    """Token ids [n] of a text, and the characters [n, 2] from and to which each token stands for it."""

    ids: np.ndarray
    offsets: np.ndarray


EncodeTexts = Callable[[list[str]], list[EncodedText]]


def encode_long_text(pieces: Iterable[str], encode: EncodeTexts, *, piece: int = _PIECE) -> Iterator[np.ndarray]:
    """Yield the token ids of the text that `pieces` add up to. Memory does not grow with the text.

    A text without any place to cut at is encoded as one.

    Args:
        encode: encodes several texts, each alone.
        piece: characters of a piece, more or less.
    """
    buffer, begin = "", 0  # begin: characters of the buffer whose tokens are out already, kept as context
    jobs: list[tuple[str, int, int]] = []  # text with its context, and the characters of it that count
    wanted = piece
    for text in pieces:
        buffer += text
        while len(buffer) - begin >= wanted + 4 * _CONTEXT:
            cut = _find_cut(buffer, begin, begin + wanted, encode)
            if cut is None:
                wanted *= 2
                continue
            wanted = piece
            start = max(0, begin - _CONTEXT)
            jobs.append((buffer[start : cut + _CONTEXT], begin - start, cut - start))
            kept = max(0, cut - _CONTEXT)
            buffer, begin = buffer[kept:], cut - kept
            if len(jobs) == _AT_ONCE:
                yield from _encode_jobs(jobs, encode)
                jobs = []
    jobs.append((buffer, begin, len(buffer)))
    yield from _encode_jobs(jobs, encode)


def _encode_jobs(jobs: list[tuple[str, int, int]], encode: EncodeTexts) -> Iterator[np.ndarray]:
    for encoded, (text, begin, end) in zip(encode([text for text, _, _ in jobs]), jobs, strict=True):
        starts = encoded.offsets[:, 0]
        counts = starts >= begin if begin else np.ones(len(starts), dtype=bool)
        if end < len(text):
            counts &= starts < end
        yield encoded.ids[counts]


def _find_cut(text: str, begin: int, end: int, encode: EncodeTexts) -> int | None:
    """Return a place to cut in the second half of text[begin:end], or None."""
    for tried, cut in enumerate(_candidates(text, begin + (end - begin) // 2, end)):
        if tried == _TRIES:
            return None
        left_start, right_start = max(0, cut - 3 * _CONTEXT), max(0, cut - _CONTEXT)
        left, right = encode([text[left_start : cut + _CONTEXT], text[right_start : cut + 3 * _CONTEXT]])
        tokens = _around(left, cut - left_start)
        if tokens is not None and tokens == _around(right, cut - right_start):
            return cut
    return None


def tokens_before(text: str, encoded: EncodedText, cuts: Sequence[int], encode: EncodeTexts) -> list[int | None]:
    """Return the number of tokens before each cut; None where the text up to the cut, alone, has others near it.

    Args:
        encoded: the whole text.
        cuts: ascending, in characters.
    """
    starts = [max(0, cut - 2 * _NEAR) for cut in cuts]
    firsts, lasts = encoded.offsets[:, 0], np.maximum.accumulate(encoded.offsets[:, 1])
    # Where spaces are trimmed, a token may begin behind the next one: `behind` is the first character from it on.
    behind = np.minimum.accumulate(firsts[::-1])[::-1]
    counts: list[int | None] = []
    for cut, start, alone in zip(
        cuts, starts, encode([text[start:cut] for start, cut in zip(starts, cuts, strict=True)]), strict=True
    ):
        begin = cut - _NEAR if start else 0
        low, high = (int(place) for place in np.searchsorted(behind, (begin, cut)))
        near = low + np.flatnonzero(firsts[low:high] < cut)
        count = low + len(near)
        across = count > 0 and lasts[count - 1] > cut  # unknown characters can have one token on both sides
        same = encoded.ids[near].tolist() == alone.ids[alone.offsets[:, 0] >= begin - start].tolist()
        counts.append(count if same and not across else None)
    return counts


def _candidates(text: str, begin: int, end: int) -> Iterator[int]:
    """Yield starts of lines, then starts of words, from the end."""
    for mark, after in (("\n", 1), (" ", 0)):
        place, tried = end, 0
        while (place := text.rfind(mark, begin, place)) >= 0 and tried < _TRIES // 2:
            before, behind = text[place - 1 : place], text[place + 1 : place + 2]
            if not behind.isspace() and (after or not before.isspace()):
                tried += 1
                yield place + after


def _around(encoded: EncodedText, cut: int) -> tuple[list[int], list[list[int]]] | None:
    """Return ids and offsets of the tokens near a cut, relative to it; None if a token stands for both sides."""
    starts, ends = encoded.offsets[:, 0] - cut, encoded.offsets[:, 1] - cut
    if ((starts < 0) & (ends > 0)).any():
        return None
    near = (starts >= -_CONTEXT // 2) & (ends <= _CONTEXT // 2)
    return encoded.ids[near].tolist(), np.stack([starts[near], ends[near]], axis=1).tolist()
