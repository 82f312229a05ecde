"""The order of parts of documents: a permutation of each epoch that is a pure function of seed, epoch and place.

Knows numbers; does not know documents. No order is ever stored: a Feistel network on the smallest even number of bits
that holds n numbers permutes them, and follows its cycle until it is back in [0, n) (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002).
"""

from collections.abc import Mapping

import numpy as np

from dash_dist.data.parts import Parts

_ROUNDS = 6


class DocumentOrder:
    """The documents of each epoch of one source in order, long ones as their parts.

    With weights, a group of n parts whose documents are about as long, of weight w, has n * w places in an epoch,
    rounded so that none are lost over epochs. Its parts take them in turn, each once before any comes again.

    Args:
        seed: None is the order of the documents, which has no weights.
        weights: least tokens of a group -> weight; documents that are shorter than all have weight 1.
    """

    def __init__(self, parts: Parts, seed: int | None, weights: Mapping[int, float]) -> None:
        self._parts = len(parts)
        self._seed = seed
        self._groups: list[tuple[np.ndarray, float]] = []
        if weights:
            group, of_group = groups_of(parts.lengths_of_documents(), weights)
            self._groups = [(np.flatnonzero(group == number), weight) for number, weight in enumerate(of_group)]

    def places(self, epoch: int) -> int:
        """Return the number of places in an epoch."""
        if not self._groups:
            return self._parts
        return sum(stop - start for start, stop in self._turns(epoch))

    def parts(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the numbers of the parts at places start to stop of an epoch, int64."""
        places = np.arange(start, stop)
        if self._seed is None:
            return places
        places = permute(places, self.places(epoch), seed=self._seed, epoch=epoch)
        if not self._groups:
            return places
        found = np.empty_like(places)
        first = 0
        for (parts, _), (begin, end) in zip(self._groups, self._turns(epoch), strict=True):
            mine = (places >= first) & (places < first + end - begin)
            rounds, turns = np.divmod(begin + places[mine] - first, max(len(parts), 1))
            order = np.empty_like(turns)
            for one in np.unique(rounds).tolist():
                order[rounds == one] = permute(turns[rounds == one], len(parts), seed=self._seed, epoch=one)
            found[mine] = parts[order]
            first += end - begin
        return found

    def _turns(self, epoch: int) -> list[tuple[int, int]]:
        """Return the first and last + 1 turn of each group in an epoch, counted over all epochs."""
        sizes = [len(parts) * weight for parts, weight in self._groups]
        return [(int(epoch * size), int((epoch + 1) * size)) for size in sizes]


def groups_of(lengths: np.ndarray, weights: Mapping[int, float]) -> tuple[np.ndarray, list[float]]:
    """Return the group of each document, and the weight of each group, of which the first has the shortest."""
    borders = sorted(weights)
    return np.searchsorted(borders, lengths, side="right"), [1.0, *(float(weights[border]) for border in borders)]


def permute(places: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the numbers at `places` of the permutation of [0, n) that belongs to (seed, epoch).

    Args:
        places: int64 [k], each in [0, n).

    Returns:
        int64 [k].
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    keys = np.random.default_rng([seed, epoch]).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    values = _rounds(places.astype(np.uint64), half, keys)
    while (outside := values >= n).any():
        values[outside] = _rounds(values[outside], half, keys)
    return values.astype(np.int64)


def _rounds(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits of each value: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
