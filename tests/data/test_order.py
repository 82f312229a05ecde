"""The permutation of each epoch: a pure function."""

import numpy as np
import pytest

from dash_dist.data.order import DocumentOrder, permute
from dash_dist.data.parts import Parts


def test_every_small_size_is_permuted():
    for n in range(1, 301):
        found = permute(np.arange(n), n, seed=n, epoch=n % 3)
        assert sorted(found.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**20 - 1, 2**20, 2**20 + 1, 3_000_017])
def test_large_sizes_are_permuted(n):
    found = permute(np.arange(n), n, seed=5, epoch=2)
    assert found.dtype == np.int64
    assert (np.bincount(found, minlength=n) == 1).all()


@pytest.mark.parametrize("n", [10**9 + 7, 2**40 + 1])
def test_no_two_of_many_places_share_a_number(n):
    places = np.random.default_rng(0).choice(n, size=100_000)
    found = permute(places, n, seed=1, epoch=0)
    assert found.min() >= 0
    assert found.max() < n
    assert len(np.unique(found)) == len(np.unique(places))
    # As spread as the places: a mean further than 5 standard errors from the middle is no accident.
    assert abs(found.mean() / n - 0.5) < 5 * (1 / 12) ** 0.5 / len(places) ** 0.5


def test_a_number_depends_on_seed_epoch_and_place_alone():
    n = 1000
    whole = permute(np.arange(n), n, seed=3, epoch=4)
    for place in (0, 17, 999):
        assert permute(np.array([place]), n, seed=3, epoch=4)[0] == whole[place]
    shuffled = np.random.default_rng(1).permutation(n)
    np.testing.assert_array_equal(permute(shuffled, n, seed=3, epoch=4), whole[shuffled])
    orders = {tuple(permute(np.arange(n), n, seed=seed, epoch=epoch)) for seed in (3, 4, 2**63) for epoch in range(5)}
    assert len(orders) == 15


def test_neighbours_are_torn_apart():
    n = 10_000
    found = permute(np.arange(n), n, seed=0, epoch=0)
    assert (np.abs(np.diff(found)) == 1).sum() < 20
    assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 0.05
    assert (found == np.arange(n)).sum() < 10


def test_the_order_is_the_one_that_checkpoints_rely_on():
    """A change of these numbers makes saved positions read other documents: raise the state's version with it."""
    assert permute(np.arange(12), 12, seed=0, epoch=0).tolist() == [2, 3, 1, 11, 10, 5, 7, 8, 9, 6, 4, 0]
    assert permute(np.arange(5), 10**7, seed=7, epoch=3).tolist() == [7597053, 1372110, 9194786, 7576903, 945472]


def counts_of_epochs(order: DocumentOrder, documents: int, epochs: int) -> np.ndarray:
    """How often each document comes in each epoch, [epochs, documents]."""
    found = [order.parts(epoch, 0, order.places(epoch)) for epoch in range(epochs)]
    return np.array([np.bincount(one, minlength=documents) for one in found])


def test_documents_without_weights_come_once_an_epoch_in_the_order_of_the_permutation():
    order = DocumentOrder(Parts(np.arange(2, 52), None), 3, {})
    for epoch in range(3):
        expected = permute(np.arange(50), 50, seed=3, epoch=epoch)
        np.testing.assert_array_equal(order.parts(epoch, 0, order.places(epoch)), expected)
        np.testing.assert_array_equal(order.parts(epoch, 7, 20), expected[7:20])
    assert DocumentOrder(Parts(np.arange(5), None), None, {}).parts(4, 1, 4).tolist() == [1, 2, 3]


def test_documents_of_a_group_come_as_often_as_their_weight_says():
    lengths = np.array([10, 99, 100, 100, 250, 1000, 5] * 30)
    weights = {100: 2.0, 200: 0.5, 1000: 3.3}
    order = DocumentOrder(Parts(lengths, None), 1, weights)
    counts = counts_of_epochs(order, len(lengths), 10)
    assert (counts[:, lengths < 100] == 1).all()
    assert (counts[:, lengths == 100] == 2).all()
    assert counts[:, lengths == 250].sum(axis=1).tolist() == [15] * 10
    assert (counts[:, lengths == 250].sum(axis=0) == 5).all()
    assert (counts[:, lengths == 1000].sum(axis=0) == 33).all()
    assert set(counts[:, lengths == 1000].sum(axis=1)) == {99}
    assert set(counts[:, lengths == 1000].flatten()) <= {2, 3, 4, 5}


def test_places_of_weighted_documents_are_a_pure_function():
    lengths = np.random.default_rng(0).integers(1, 100, size=200)
    order = DocumentOrder(Parts(lengths, None), 7, {50: 1.7, 80: 0.01})
    for epoch in (0, 1, 9):
        whole = order.parts(epoch, 0, order.places(epoch))
        again = DocumentOrder(Parts(lengths, None), 7, {50: 1.7, 80: 0.01})
        parts = [again.parts(epoch, start, start + 1) for start in range(len(whole))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(order.parts(0, 0, 50), order.parts(1, 0, 50))
