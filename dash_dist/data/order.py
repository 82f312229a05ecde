"""The order of documents: a permutation of each epoch that is a pure function of seed, epoch and place.

Knows numbers; does not know documents. No order is ever stored: a Feistel network on the smallest even number of bits
that holds n numbers permutes them, and follows its cycle until it is back in [0, n) (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002).
"""

import numpy as np

_ROUNDS = 6


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
