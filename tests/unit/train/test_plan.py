"""The plan: the same global batches for every world size, every sample once per epoch."""

from collections import Counter

import numpy as np
import pytest

from valley_ray.train.plan import StagePlan, epoch_order


def make_plan(**changes: int | None) -> StagePlan:
    values = {"stage": 0, "seed": 3, "global_batch_size": 12, "micro_batch_size": 3, "epochs": 3, "max_steps": None}
    return StagePlan(**{**values, **changes})


def all_steps(plan: StagePlan, num_samples: int) -> list[tuple[int, ...]]:
    steps = [plan.step(index, num_known=num_samples, complete=True) for index in range(plan.num_steps(num_samples))]
    return [step.samples for step in steps if step is not None]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 64])
def test_any_world_size_sees_the_same_global_batches(world: int) -> None:
    plan = make_plan()
    count = plan.num_micro_batches(world)
    for index in range(plan.num_steps(50)):
        step = plan.step(index, num_known=50, complete=True)
        assert step is not None
        of_ranks = [step.of_rank(rank, world, count) for rank in range(world)]
        assert {len(slots) for slots in of_ranks} == {count}, "every rank runs as many micro-batches as the others"
        in_slot_order = [of_ranks[slot % world][slot // world] for slot in range(len(step.slots))]
        assert tuple(number for slot in in_slot_order for number in slot) == step.samples
        assert sum(len(slot) for slots in of_ranks for slot in slots) == len(step.samples)


@pytest.mark.parametrize("num_samples", [1, 11, 12, 13, 50, 144])
def test_every_sample_comes_once_per_epoch_and_none_is_dropped(num_samples: int) -> None:
    plan = make_plan()
    steps = all_steps(plan, num_samples)
    stream = [number for step in steps for number in step]
    assert len(stream) == 3 * num_samples
    for epoch in range(3):
        assert Counter(stream[epoch * num_samples : (epoch + 1) * num_samples]) == Counter(range(num_samples))
    assert all(len(step) == 12 for step in steps[:-1]), "only the last batch of a stage may be smaller"


def test_first_epoch_follows_the_windows_and_later_ones_are_shuffled() -> None:
    stream = [number for step in all_steps(make_plan(), 50) for number in step]
    assert stream[:50] == list(range(50))
    assert stream[50:100] != list(range(50))
    assert stream[50:100] != stream[100:150]
    assert stream[50:100] == epoch_order(50, 3, 1).tolist()


def test_a_step_is_decided_as_soon_as_its_samples_are_committed_and_never_changes() -> None:
    plan = make_plan()
    assert plan.step(1, num_known=23, complete=False) is None
    early = plan.step(1, num_known=24, complete=False)
    assert early == plan.step(1, num_known=40, complete=False) == plan.step(1, num_known=50, complete=True)
    assert early is not None
    assert early.samples == tuple(range(12, 24))


def test_a_step_that_reaches_into_the_next_epoch_waits_for_all_windows() -> None:
    plan = make_plan()
    assert plan.step(4, num_known=50, complete=False) is None
    step = plan.step(4, num_known=50, complete=True)
    assert step is not None
    assert step.samples[:2] == (48, 49)


def test_max_steps_goes_through_the_data_as_often_as_it_takes() -> None:
    plan = make_plan(epochs=None, max_steps=20)
    steps = all_steps(plan, 7)
    assert len(steps) == 20
    assert all(len(step) == 12 for step in steps)
    counts = Counter(number for step in steps for number in step)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_stages_shuffle_differently() -> None:
    first, second = make_plan(), make_plan(stage=1)
    assert all_steps(first, 50)[8] != all_steps(second, 50)[8]


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    order = epoch_order(1000, 0, 0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == epoch_order(1000, 0, 0).tolist()
    assert order.tolist() != epoch_order(1000, 1, 0).tolist()
    assert order.tolist() != epoch_order(1000, 0, 1).tolist()
