"""Checkpoints while uploads take time: no death costs more steps than were allowed."""

import random

import pytest

from valley_ray.train.cadence import Cadence


def simulate(every: int, *, upload_steps: int, num_steps: int = 200) -> tuple[int, int, int]:
    """Most steps that a death would cost, checkpoints made, waits for an upload."""
    cadence = Cadence(every, step=0)
    saved, committed, cost, num_saved, num_waits, seconds = 0, 0, 0, 0, 0, 0.0
    for step in range(1, num_steps + 1):
        cost = max(cost, step - committed)
        if saved > committed and step >= saved + upload_steps:
            committed, seconds = saved, float(upload_steps)
            cadence.committed()
        cadence.lead = cadence.lead_of(upload_s=seconds, step_s=1.0)
        if cadence.is_due(step):
            committed = saved
            saved, num_saved = step, num_saved + 1
            cadence.saved(step)
        if cadence.must_wait(step):
            committed, seconds, num_waits = saved, float(upload_steps), num_waits + 1
            cadence.committed()
    return cost, num_saved, num_waits


@pytest.mark.parametrize("every", [1, 2, 3, 4, 10, 50])
def test_a_death_costs_at_most_the_interval_whatever_an_upload_takes(every: int) -> None:
    for upload_steps in (1, 2, 5, 24, 40, 1000):
        cost, _, _ = simulate(every, upload_steps=upload_steps)
        assert cost <= every, f"{upload_steps=}"


def test_a_short_upload_is_waited_for_once_and_costs_few_checkpoints_more() -> None:
    _, num_saved, num_waits = simulate(50, upload_steps=5)
    assert num_waits == 1, "the first one, whose time nobody knew"
    assert num_saved == 4, "one in 45 steps instead of one in 50"


def test_a_long_upload_makes_no_more_checkpoints_than_were_asked_for() -> None:
    _, num_saved, num_waits = simulate(10, upload_steps=30)
    assert (num_saved, num_waits) == (20, 20)


def test_none_makes_no_checkpoints() -> None:
    cadence = Cadence(None, step=3)
    steps = random.Random(0).sample(range(4, 1000), 20)
    assert not any(cadence.is_due(step) or cadence.must_wait(step) for step in steps)
    assert cadence.is_saved(4)
