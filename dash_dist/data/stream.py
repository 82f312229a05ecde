"""The batches of one data-parallel rank, and the position in the data.

Knows the rows of the global batch this rank reads. Every rank plans the whole global batch from numbers and lengths of
documents, and reads the tokens of its own rows only. So the position is one for all ranks: a few numbers for each
source, and the documents that are not used up. It fits any data-parallel size, micro-batch size and number of ranks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dash_dist.config.data import DataConfig
from dash_dist.data.corpus import Corpus, changed_documents
from dash_dist.data.mixture import Mixture, SourceCursor, Waiting, shares_of
from dash_dist.data.packing import JoinedPacker, PackedSequence, Packer, Piece, SeparatePacker, count_inputs
from dash_dist.data.parts import LEAST_TOKENS
from dash_dist.data.prepare import prepare_here
from dash_dist.data.sizes import check_sizes
from dash_dist.data.tokenizer import Tokenizer

_VERSION = 2
_IDENTITY = ("tokenizer", "special_tokens", "documents", "shuffle_seed")
_EMPTY_BATCHES = 1000
_ORDER = ("documents", "shuffle_seed")
_SIZES = ("sequence_length", "global_batch_size")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of whole sequences, before any context-parallel split."""

    tokens: torch.Tensor
    """int64 [micro_batch_size, T]"""
    labels: torch.Tensor
    """int64 [micro_batch_size, T]: the token after each token."""
    loss_mask: torch.Tensor
    """bool [micro_batch_size, T]: where the label counts: not at padding, nor where its row's kind leaves it out."""
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


@dataclass(frozen=True)
class SourceProgress:
    """Use of one source so far.

    Attributes:
        tokens: inputs of all sequences.
        epochs: passes over its documents, the current one as a fraction.
        loss_tokens: labels that count in the loss; None if all of every source do.
    """

    tokens: int
    epochs: float
    loss_tokens: int | None = None


class DataStream:
    """Endless steps of one data-parallel rank; made by `build_data_stream`."""

    def __init__(
        self,
        corpus: Corpus,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        global_batch_size: int,
        rows: range,
        micro_batch_size: int,
        chunk_size: int,
    ) -> None:
        self._corpus = corpus
        self._config = config
        self._sources = list(corpus.sources.values())
        self._rows = rows
        self._micro_batch_size = micro_batch_size
        self._length = sequence_length
        self._rows_of_all = global_batch_size
        self._identity = {
            "tokenizer": tokenizer.fingerprint,
            "special_tokens": config.special_tokens,
            "documents": config.documents,
            "shuffle_seed": config.shuffle_seed,
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
        }
        drops = config.documents == "separate" and config.long_documents == "drop"
        longest = sequence_length + 1 if drops else None
        self._weights = [dict(one.length_weights) for one in config.all_sources]
        self._cursors = [
            SourceCursor(source, config.shuffle_seed, longest=longest, weights=weights, cut=config.cut_documents)
            for source, weights in zip(self._sources, self._weights, strict=True)
        ]
        mixture = Mixture(self._cursors, shares_of(config, corpus))
        self._shares = mixture.shares
        self._packer: Packer
        if config.documents == "joined":
            self._packer = JoinedPacker(mixture.next_document, sequence_length=sequence_length)
        else:
            self._packer = SeparatePacker(
                mixture.next_document,
                sequence_length=sequence_length,
                chunk_size=chunk_size,
                lookahead=config.lookahead,
                buckets=config.length_buckets,
                end_of_document=tokenizer.end_of_document,
            )
        self._tokens: Counter[int] = Counter()
        self._is_masked = any(source.is_masked for source in self._sources)
        self._loss_tokens: Counter[int] = Counter()
        self.step_tokens = 0
        """Inputs of the last global batch, without padding."""

    @property
    def skipped_documents(self) -> int:
        """Documents without text, damaged or too long, passed over since the start of training; again in each epoch."""
        return sum(cursor.skipped + cursor.dropped for cursor in self._cursors)

    @property
    def progress(self) -> dict[str, SourceProgress]:
        """Use of each source by all ranks since the start of training, by title."""
        return {
            title: SourceProgress(
                self._tokens[number],
                cursor.epochs,
                self._loss_tokens[number] if self._is_masked else None,
            )
            for number, (title, cursor) in enumerate(zip(self._corpus.sources, self._cursors, strict=True))
        }

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, rows in ascending order.

        A global batch none of whose labels counts in the loss is passed over, at every rank alike.

        Raises OSError or ValueError if tokens cannot be read, or none counts in very many batches.
        """
        for _ in range(_EMPTY_BATCHES):
            planned = [self._packer.plan() for _ in range(self._rows_of_all)]
            loss_tokens = self._count_loss_tokens(planned)
            if loss_tokens is None or loss_tokens.total():
                break
        else:
            raise ValueError(
                f"no token of {_EMPTY_BATCHES} global batches of {', '.join(self._corpus.sources)} counts in the loss: "
                "add documents whose tokens do"
            )
        self._loss_tokens.update(loss_tokens or {})
        before = self._tokens.total()
        for pieces in planned:
            self._tokens.update(count_inputs(pieces, self._length))
        self.step_tokens = self._tokens.total() - before
        own = planned[self._rows.start : self._rows.stop]
        sequences = [self._packer.fill(pieces, self._read) for pieces in own]
        size = self._micro_batch_size
        return [_batch(sequences[start : start + size]) for start in range(0, len(sequences), size)]

    def _count_loss_tokens(self, planned: list[list[Piece]]) -> Counter[int] | None:
        """Return the labels of a global batch that count, by source; None where all labels of every source do."""
        if not self._is_masked:
            return None
        counts: Counter[int] = Counter()
        for pieces in planned:
            for one in self._packer.labels(pieces):
                counts[one.source] += self._sources[one.source].count_loss_tokens(one.document, one.start, one.stop)
        return counts

    def _read(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        source, place = self._sources[piece.source], (piece.document, piece.start, piece.stop)
        return source.read(*place), source.loss_mask(*place)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step, the same at every rank. JSON-serialisable, a few hundred bytes, and some
        bytes for each document that waits to be packed."""
        return {
            "version": _VERSION,
            **self._identity,
            "corpus": self._corpus.fingerprint,
            "sources": [
                {
                    "title": title,
                    "documents": len(source),
                    "digest": source.record.digest,
                    "share": share,
                    "tokens": self._tokens[number],
                    **({"loss_tokens": self._loss_tokens[number]} if self._is_masked else {}),
                    "length_weights": _jsonable(self._weights[number]),
                    "cut_documents": self._config.cut_documents,
                    "parts": len(cursor.parts),
                    **cursor.state_dict(),
                }
                for number, ((title, source), share, cursor) in enumerate(
                    zip(self._corpus.sources.items(), self._shares, self._cursors, strict=True)
                )
            ],
            "waiting": [self._save(one) for one in self._packer.waiting],
        }

    def _save(self, one: Waiting) -> list[int]:
        """Return numbers for a checkpoint: of a part its end too, which another cut in a later run leaves as it is."""
        is_part = one.length < self._sources[one.source].lengths[one.document]
        return [one.source, one.document, one.offset, *([one.length] if is_part else [])]

    def load_state_dict(self, state: Mapping[str, Any], *, new_stage: bool = False) -> list[str]:
        """Continue exactly where the run that saved `state` stopped; returns a sentence for each difference.

        Another sequence length or global batch size continues with the next unread token. A repaired document changes
        nothing else. Other changes of the documents need data.accept_changes.

        Args:
            new_stage: `state` is of the stage before, which may have read other sources, treated documents in another
                way or read them in another order. Sources that both read in the same way continue.

        Raises ValueError if it is a position in other data.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"the checkpoint's position in the data is of version {state.get('version', 1)}, and this one reads "
                f"{_VERSION}: continue with the version of dash-dist that saved it, or start a new run from its weights"
            )
        same_tokens = all(state[key] == self._identity[key] for key in _IDENTITY if key not in _ORDER)
        anew_for = [key for key in _ORDER if new_stage and same_tokens and state[key] != self._identity[key]]
        if anew_for:
            return [
                f"data.{key} was {state[key]} and is {self._identity[key]}: the documents are read from the beginning"
                for key in anew_for
            ]
        for key in _IDENTITY:
            if state[key] != self._identity[key]:
                raise ValueError(
                    f"the checkpoint's position in the data was saved with {key} {state[key]}, this run has "
                    f"{self._identity[key]}: restore what it was saved with, or start a new run from scratch"
                )
        notes = [
            f"training.{key} was {state[key]} and is {self._identity[key]}: continuing with the next unread token"
            for key in _SIZES
            if state[key] != self._identity[key]
        ]
        number_of, more = self._match(state["sources"], may_have_moved=not new_stage)
        notes += more
        anew = set()
        for old, number in number_of.items():
            saved, source = state["sources"][old], self._sources[number]
            same_order, note = self._check_documents(state["corpus"], saved, source.record.title)
            if note:
                notes.append(note)
            if not same_order:
                anew.add(old)
            other_order = self._describe_other_order(saved, number)
            notes += other_order
            if not same_order or other_order:
                saved = {**saved, "epoch": saved["epoch"] + 1, "place": 0}
            self._cursors[number].load_state_dict(saved)
            self._tokens[number] = saved["tokens"]
            self._loss_tokens[number] = saved.get("loss_tokens", saved["tokens"])
        before = [state["sources"][old]["share"] for old in number_of]
        now = [self._shares[new] for new in number_of.values()]
        if before != now:
            for cursor in self._cursors:  # what was drawn by other shares is not made up for
                cursor.drawn = 0
            if not more and state["corpus"] == self._corpus.fingerprint:
                notes.append(f"shares of the sources were {_percents(before)} and are {_percents(now)}")
        waiting = []
        for old, document, offset, *end in state["waiting"]:
            if old in number_of and old not in anew:
                length = min([int(self._sources[number_of[old]].lengths[document]), *end])
                if length >= LEAST_TOKENS and offset < length:
                    waiting.append(Waiting(number_of[old], document, length, offset))
        self._packer.resume(waiting)
        return notes

    def _describe_other_order(self, saved: Mapping[str, Any], number: int) -> list[str]:
        """Return a sentence for each reason why the same documents of a source are in another order of parts."""
        title, told = self._sources[number].record.title, []
        weights = saved.get("length_weights", {}), _jsonable(self._weights[number])
        if weights[0] != weights[1]:
            told.append(f"length_weights of {title} were {weights[0]} and are {weights[1]}: a new epoch begins")
        cut = saved.get("cut_documents"), self._config.cut_documents
        parts = saved.get("parts", saved["documents"]), len(self._cursors[number].parts)
        if cut[0] != cut[1]:
            told.append(f"cut_documents of {title} was {cut[0]} and is {cut[1]}: a new epoch begins")
        elif parts[0] != parts[1] and saved["documents"] == len(self._sources[number]):
            told.append(f"documents of {title} had {parts[0]} parts and have {parts[1]}: a new epoch begins")
        return told

    def _match(self, saved: list[Mapping[str, Any]], *, may_have_moved: bool) -> tuple[dict[int, int], list[str]]:
        """Return the number of each saved source in this run, and a sentence for each that is new or gone."""
        titles = list(self._corpus.sources)
        if may_have_moved and len(saved) == len(titles) == 1:
            return {0: 0}, []
        before = [one["title"] for one in saved]
        notes = [f"data.sources: {title} is new" for title in titles if title not in before]
        notes += [f"data.sources: {title} is no longer read" for title in before if title not in titles]
        return {before.index(title): titles.index(title) for title in titles if title in before}, notes

    def _check_documents(self, corpus: str, saved: Mapping[str, Any], title: str) -> tuple[bool, str]:
        """Return whether the order of documents is the saved one, and a sentence about what has changed."""
        source = self._corpus.sources[title]
        if saved["digest"] == source.record.digest and saved["documents"] == len(source):
            return True, ""
        remedy = "restore them, or set data.accept_changes=true to continue with"
        if saved["documents"] != len(source):
            told = f"{title} had {saved['documents']} documents at the checkpoint and has {len(source)}"
            if not self._config.accept_changes:
                raise ValueError(f"{told}: {remedy} a new epoch of what is there now")
            return False, f"{told}: a new epoch begins"
        changed = changed_documents(self._corpus, corpus, saved["title"], title)
        if changed == []:
            return True, f"{title}: documents that could not be read are repaired; all others are as before"
        told = f"documents of {title} have changed since the checkpoint"
        if changed is not None:
            told = f"{len(changed)} {told} (the first is number {changed[0]})"
        if not self._config.accept_changes:
            raise ValueError(f"{told}: {remedy} them as they are now")
        return True, f"{told}: continuing with them as they are now"


def _jsonable(weights: Mapping[int, float]) -> dict[str, float]:
    return {str(length): weight for length, weight in weights.items()}


def _percents(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


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
    corpus: Corpus | None = None,
) -> DataStream:
    """The data of rank `dp_rank` of `dp_size`: rows dp_rank x G / dp_size up to the next rank's of each global batch of
    G = global_batch_size sequences of sequence_length tokens, in micro-batches. Where documents are separate, each is
    padded to a multiple of chunk_size tokens.

    Args:
        corpus: prepared; None prepares it in this process.

    Raises ValueError for sizes that do not fit, for a corpus without text and for damaged files; FileNotFoundError or
    PermissionError for files that are missing or may not be read.
    """
    check_sizes(
        config,
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        chunk_size=chunk_size,
    )
    rows_per_rank = global_batch_size // dp_size
    return DataStream(
        prepare_here(config, tokenizer) if corpus is None else corpus,
        config,
        tokenizer,
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        rows=range(dp_rank * rows_per_rank, (dp_rank + 1) * rows_per_rank),
        micro_batch_size=micro_batch_size,
        chunk_size=chunk_size,
    )


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
