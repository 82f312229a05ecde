"""Advice on how a corpus is read.

Knows lengths of documents and sizes of batches; does not read tokens.
"""

import numpy as np

from dash_dist.config.data import DataConfig
from dash_dist.data.corpus import Corpus
from dash_dist.data.mixture import shares_of

_LEAST_SEQUENCES = 4
"""Of a global batch. Fewer sequences are of few documents in any order."""


def advise(config: DataConfig, corpus: Corpus, *, sequence_length: int, global_batch_size: int) -> str | None:
    """Return what to change where a global batch is parts of fewer documents than half its sequences; None if nothing.

    The sequences that a long document fills follow each other, and what they teach is much the same.
    """
    cut = config.cut_documents
    if global_batch_size < _LEAST_SEQUENCES or config.shuffle_seed is None:
        return None
    if config.documents == "separate" and config.long_documents == "drop":
        return None
    shares = shares_of(config, corpus)
    lengths = [_length_around_a_token(source.lengths, cut) for source in corpus.sources.values()]
    length = sum(share * own for share, own in zip(shares, lengths, strict=True))
    if length <= 2 * sequence_length:
        return None
    tokens = global_batch_size * sequence_length
    return (
        f"a global batch of {tokens:,} tokens is parts of about {max(1, round(tokens / length))} documents, since a "
        f"token's document has {length:,.0f} tokens on average: set data.cut_documents to {sequence_length}, so that "
        "batches are parts of many documents and models learn faster from them"
    )


def _length_around_a_token(lengths: np.ndarray, cut: int | None) -> float:
    """Return the tokens of a token's document, or of its part, on average over the tokens."""
    tokens = lengths.astype(np.float64)
    return float(tokens @ np.minimum(tokens, cut or np.inf) / max(tokens.sum(), 1.0))
