"""The batches of one data-parallel rank, and the position in the data.

Knows the rows of the global batch this rank reads. Does not know other ranks: every context-, tensor- and
pipeline-parallel rank of one data-parallel index builds the same stream and gets identical batches.

The position is kept per row of the global batch, never per rank: a checkpoint holds all rows
(`merge_states`), and a run with another data-parallel or micro-batch size picks out the rows it needs.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dash_dist.config.data import DataConfig, check_separate
from dash_dist.data.corpus import Corpus, open_corpus
from dash_dist.data.documents import RowDocuments
from dash_dist.data.packing import JoinedPacker, PackedSequence, Packer, SeparatePacker
from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer

_IDENTITY = ("corpus", "tokenizer", "documents", "sequence_length", "global_batch_size")
_UNWRITTEN = {"documents": "joined"}
"""What a state means that was saved before there was a choice."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of whole sequences, before any context-parallel split."""

    tokens: torch.Tensor
    """int64 [micro_batch_size, T]"""
    labels: torch.Tensor
    """int64 [micro_batch_size, T]: the token after each token."""
    loss_mask: torch.Tensor
    """bool [micro_batch_size, T]: where the label counts, which is everywhere but at padding."""
    cu_seqlens: torch.Tensor | None
    """int32 [documents + 1] on the CPU, where documents are separate: document i of the one sequence is its tokens
    cu_seqlens[i] to cu_seqlens[i + 1] - 1, whole chunks, padding included. None where documents are joined."""

    @property
    def document_length(self) -> float:
        """Tokens of the document that a token is in, on average over the tokens; T where documents are joined."""
        if self.cu_seqlens is None:
            return float(self.tokens.shape[1])
        lengths = self.cu_seqlens.diff().double()
        return float(lengths.square().sum() / lengths.sum())


class _Row:
    """One row of the global batch: its documents, packed."""

    def __init__(self, documents: RowDocuments, packer: Packer):
        self.documents = documents
        self._packer = packer

    def next_sequence(self) -> PackedSequence:
        return self._packer.next_sequence()

    def state_dict(self) -> dict[str, Any]:
        # Inside a document the position is before it, plus an offset: one document is read again on resume,
        # and none of its tokens is stored.
        inside = self._packer.inside_document
        position = self.documents.position_before() if inside else self.documents.position()
        return {"position": position, **self._packer.position()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.documents.resume(state["position"])
        self._packer.resume(state)


class DataStream:
    """Endless steps of one data-parallel rank; made by `build_data_stream`."""

    def __init__(self, rows: dict[int, _Row], identity: dict[str, Any], micro_batch_size: int):
        self._rows = rows
        self._identity = identity
        self._micro_batch_size = micro_batch_size

    @property
    def skipped_documents(self) -> int:
        """Empty and undecodable documents this rank's rows passed over since the start of training, counted
        again in each epoch; a resumed stream counts on."""
        return sum(row.documents.skipped for row in self._rows.values())

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, rows in ascending order."""
        sequences = [row.next_sequence() for row in self._rows.values()]
        size = self._micro_batch_size
        return [_batch(sequences[start : start + size]) for start in range(0, len(sequences), size)]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step: of this rank's rows, and of what it is a position in.
        JSON-serialisable, a few hundred bytes a row whatever the length of the documents."""
        return {**self._identity, "rows": {str(index): row.state_dict() for index, row in self._rows.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the run that saved `state` stopped.

        state: one that has all rows of this rank, such as the merged states of all data-parallel ranks.

        Raises ValueError if it is a position in other data, or if rows are missing.
        """
        for key in _IDENTITY:
            saved_with = state.get(key, _UNWRITTEN.get(key))
            if saved_with != self._identity[key]:
                raise ValueError(
                    f"the checkpoint's position in the data was saved with {key} {saved_with}, this run has "
                    f"{self._identity[key]}: restore what it was saved with, or start a new run from scratch"
                )
        saved = {int(index): row_state for index, row_state in state["rows"].items()}
        missing = sorted(set(self._rows) - set(saved))
        if missing:
            raise ValueError(
                f"the state has no position for rows {missing} of the global batch, only for {sorted(saved)}: "
                "merge the states of all data-parallel ranks with merge_states before saving"
            )
        for index, row in self._rows.items():
            row.load_state_dict(saved[index])


def build_data_stream(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    chunk_size: int,
) -> DataStream:
    """The data of rank `dp_rank` of `dp_size`: rows dp_rank x G / dp_size up to the next rank's of each global batch of
    G = global_batch_size sequences of sequence_length tokens, in micro-batches. Where documents are separate, each is
    padded to a multiple of chunk_size tokens.

    Every rank looks up the first document of every row, not only of its own, so that a corpus that is too
    small or damaged at its beginning fails on all ranks.

    Raises ValueError for sizes that do not fit, for fewer documents than rows, for a corpus without text and for
    damaged files; FileNotFoundError or PermissionError for files that are missing or may not be read.
    """
    _check_sizes(sequence_length, global_batch_size, dp_rank, dp_size, micro_batch_size)
    if config.documents == "separate":
        check_separate(sequence_length=sequence_length, micro_batch_size=micro_batch_size, chunk_size=chunk_size)
    corpus = open_corpus(config)
    _check_first_documents(corpus, config, global_batch_size)
    reported: set[str] = set()
    rows_per_rank = global_batch_size // dp_size
    packer_of: Callable[..., Packer] = JoinedPacker
    if config.documents == "separate":
        packer_of = functools.partial(SeparatePacker, chunk_size=chunk_size)
    rows = {}
    for row in range(dp_rank * rows_per_rank, (dp_rank + 1) * rows_per_rank):
        documents = RowDocuments(
            corpus,
            tokenizer.encode,
            row=row,
            rows=global_batch_size,
            undecodable=config.undecodable,
            reported=reported,
        )
        packer = packer_of(
            documents.next_document, sequence_length=sequence_length, end_of_document=tokenizer.end_of_document
        )
        rows[row] = _Row(documents, packer)
    identity = {
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "documents": config.documents,
        "sequence_length": sequence_length,
        "global_batch_size": global_batch_size,
    }
    return DataStream(rows, identity, micro_batch_size)


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One state with the rows of all: the states of all data-parallel ranks at the same step, in any order.
    States of ranks that read the same rows may be among them.

    Raises ValueError if they are positions in different data, disagree about a row, or leave rows out.
    """
    states = list(states)
    if not states:
        raise ValueError("no states to merge: give the state_dict() of every data-parallel rank")
    merged: dict[str, Any] = {key: states[0][key] for key in _IDENTITY}
    rows: dict[str, Any] = {}
    for state in states:
        for key in _IDENTITY:
            if state[key] != merged[key]:
                raise ValueError(
                    f"ranks disagree about {key}: {merged[key]} and {state[key]}; every rank must be given the same "
                    "data config and see the same files"
                )
        for index, row_state in state["rows"].items():
            if rows.setdefault(str(index), row_state) != row_state:
                raise ValueError(f"two states disagree about row {index}: they are not of the same step")
    missing = sorted(set(range(merged["global_batch_size"])) - {int(index) for index in rows})
    if missing:
        raise ValueError(f"rows {missing} of the global batch are in none of the {len(states)} states: give all ranks'")
    merged["rows"] = dict(sorted(rows.items(), key=lambda item: int(item[0])))
    return merged


def _batch(sequences: list[PackedSequence]) -> Batch:
    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(sequence, name) for sequence in sequences]))

    cu_seqlens = sequences[0].cu_seqlens
    return Batch(
        tokens=stack("tokens"),
        labels=stack("labels"),
        loss_mask=stack("loss_mask"),
        cu_seqlens=None if cu_seqlens is None else torch.from_numpy(cu_seqlens),
    )


def _check_sizes(
    sequence_length: int, global_batch_size: int, dp_rank: int, dp_size: int, micro_batch_size: int
) -> None:
    for name, size in (
        ("sequence_length", sequence_length),
        ("global_batch_size", global_batch_size),
        ("dp_size", dp_size),
        ("micro_batch_size", micro_batch_size),
    ):
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not in [0, dp_size={dp_size})")
    unit = dp_size * micro_batch_size
    if global_batch_size % unit:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of dp_size x micro_batch_size = "
            f"{dp_size} x {micro_batch_size}: use {(global_batch_size // unit + 1) * unit}"
        )


def _check_first_documents(corpus: Corpus, config: DataConfig, global_batch_size: int) -> None:
    # Whether there is text is a question about bytes, so no long document is tokenised for it.
    encode = ByteTokenizer().encode
    reported: set[str] = set()
    for row in range(global_batch_size):
        RowDocuments(
            corpus, encode, row=row, rows=global_batch_size, undecodable=config.undecodable, reported=reported
        ).next_document()
