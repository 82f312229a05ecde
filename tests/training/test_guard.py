"""Which losses set a run back, and how far."""

import math

import pytest

from dash_dist.config.upkeep import FaultsSection
from dash_dist.run.state import RunState
from dash_dist.training.faults.guard import LossGuard

FLUTTER = [2.0 + 0.01 * (-1) ** step for step in range(10)]


def guard_after(losses, state=None, **faults):
    guard = LossGuard(FaultsSection(**faults), state or RunState())
    for step, loss in enumerate(losses, start=1):
        assert guard.judge(step, loss, 1.0, skipped=False) is None
    return guard


def bad_steps(guard, steps):
    return [guard.judge(step, math.nan, math.nan, skipped=True) for step in steps]


def test_too_many_bad_steps_in_a_row_put_the_weights_before_them_in_doubt():
    guard = guard_after([2.0] * 5, max_skipped_steps=2)
    assert bad_steps(guard, [6, 7]) == [None, None]
    (rollback,) = bad_steps(guard, [8])
    # The update of step 5 made the weights that gave no number: those of step 4 did.
    assert (rollback.newest_step, rollback.first, rollback.last) == (4, None, 8)
    assert "step 8: loss nan" in rollback.reason
    assert "faults.max_skipped_steps = 2" in rollback.reason


def test_a_good_step_ends_the_row():
    guard = guard_after([2.0] * 5, max_skipped_steps=2)
    for first in (6, 9, 12):
        assert bad_steps(guard, [first, first + 1]) == [None, None]
        assert guard.judge(first + 2, 2.0, 1.0, skipped=False) is None


def test_the_row_goes_on_in_the_next_process():
    state = RunState(step=7, skipped_in_a_row=2)
    (rollback,) = bad_steps(guard_after([], state, max_skipped_steps=2), [8])
    assert rollback.newest_step == 4


def test_a_spike_is_told_from_the_flutter_of_the_losses():
    guard = guard_after(FLUTTER, spike_z_score=6.0, spike_window=10)
    # The deviation of the flutter is 1.4826 x 0.01: 0.08 above the median is 5.4 of them, 0.1 is 6.7.
    assert guard.judge(11, 2.08, 1.0, skipped=False) is None
    rollback = guard.judge(12, 2.1, 1.0, skipped=False)
    assert (rollback.newest_step, rollback.first, rollback.last) == (11, 12, 12)
    assert "step 12: loss 2.1000" in rollback.reason
    # It is no part of what the next losses are compared with.
    assert 2.1 not in guard.recent_losses


def test_a_fall_is_no_spike():
    assert guard_after(FLUTTER, spike_z_score=6.0, spike_window=10).judge(11, 0.1, 1.0, skipped=False) is None


def test_losses_that_stand_still_do_not_make_a_spike_of_every_change():
    guard = guard_after([2.0] * 10, spike_z_score=6.0, spike_window=10)
    assert guard.judge(11, 2.01, 1.0, skipped=False) is None
    assert guard.judge(12, 2.1, 1.0, skipped=False) is not None


def test_no_spike_is_seen_before_the_window_is_full_nor_by_default():
    assert guard_after([2.0] * 9, spike_z_score=6.0, spike_window=10).judge(10, 50.0, 1.0, skipped=False) is None
    guard = guard_after([2.0] * 300)
    assert guard.judge(301, 50.0, 1.0, skipped=False) is None
    assert guard.recent_losses == []


def test_a_restarted_process_sees_the_spike_that_the_first_would_have_seen():
    first = guard_after(FLUTTER, spike_z_score=6.0, spike_window=10)
    state = RunState(step=10, recent_losses=first.recent_losses)
    second = guard_after([], state, spike_z_score=6.0, spike_window=10)
    assert second.judge(11, 2.1, 1.0, skipped=False) == first.judge(11, 2.1, 1.0, skipped=False) is not None


@pytest.mark.parametrize("z_score", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_that_cannot_be_meant_is_refused(z_score):
    with pytest.raises(ValueError, match="spike_z_score"):
        FaultsSection(spike_z_score=z_score)
