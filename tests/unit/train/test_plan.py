"""The plan: the same global batches for every world size, every sample as often as its weight says."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from valley_ray.errors import ConfigError
from valley_ray.train.order import KnownSamples, check_weights
from valley_ray.train.plan import GROUPED_BATCHES, PlanDigest, StagePlan, StepPlan, epoch_order, pack

PACK_TOKENS = 64


def make_plan(**changes: object) -> StagePlan:
    values = {"stage": 0, "seed": 3, "global_batch_size": 12, "micro_batch_size": 3, "epochs": 3, "max_steps": None}
    return StagePlan(**{**values, **changes})  # type: ignore[arg-type]


def make_known(
    num_samples: int, *, num_sources: int = 1, window_size: int = 10, windows: int | None = None
) -> KnownSamples:
    """Samples of 3 to 64 tokens; of the first `windows` windows, where that is given."""
    num_windows = -(-num_samples // window_size)
    windows = num_windows if windows is None else windows
    rng = np.random.default_rng(num_samples)
    lengths, sources = rng.integers(3, PACK_TOKENS + 1, num_samples), rng.integers(0, num_sources, num_samples)
    count = min(num_samples, windows * window_size)
    return KnownSamples(
        num_tokens=lengths[:count].astype(np.int64),
        num_label_tokens=lengths[:count].astype(np.int64) // 2,
        sources=sources[:count].astype(np.int64),
        source_names=tuple(f"set-{source}" for source in range(num_sources)),
        window_ends=np.minimum(np.arange(1, windows + 1) * window_size, count).astype(np.int64),
        complete=windows == num_windows,
    )


def all_steps(plan: StagePlan, known: KnownSamples) -> list[StepPlan]:
    stream = plan.stream(known)
    num_steps = plan.steps_in(stream)
    assert num_steps is not None
    steps = [plan.step(index, stream) for index in range(num_steps)]
    assert None not in steps, "with all windows known, every step is decided"
    return [step for step in steps if step is not None]


def all_samples(plan: StagePlan, num_samples: int) -> list[tuple[int, ...]]:
    return [step.samples for step in all_steps(plan, make_known(num_samples))]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("pack_tokens", [None, PACK_TOKENS])
def test_any_world_size_sees_the_same_global_batches(world: int, pack_tokens: int | None) -> None:
    for step in all_steps(make_plan(pack_tokens=pack_tokens), make_known(50)):
        of_ranks = [step.of_rank(rank, world) for rank in range(world)]
        assert {len(slots) for slots in of_ranks} == {-(-len(step.slots) // world)}, "as many on every rank"
        in_slot_order = [of_ranks[slot % world][slot // world] for slot in range(len(step.slots))]
        assert tuple(number for slot in in_slot_order for number in slot) == step.samples
        assert sum(len(slot) for slots in of_ranks for slot in slots) == len(step.samples)


@pytest.mark.parametrize("num_samples", [1, 11, 12, 13, 50, 144])
def test_every_sample_comes_once_per_epoch_and_none_is_dropped(num_samples: int) -> None:
    steps = all_samples(make_plan(), num_samples)
    stream = [number for step in steps for number in step]
    assert len(stream) == 3 * num_samples
    for epoch in range(3):
        assert Counter(stream[epoch * num_samples : (epoch + 1) * num_samples]) == Counter(range(num_samples))
    assert all(len(step) == 12 for step in steps[:-1]), "only the last batch of a stage may be smaller"


def test_first_epoch_follows_the_windows_and_later_ones_are_shuffled() -> None:
    stream = [number for step in all_samples(make_plan(), 50) for number in step]
    assert stream[:50] == list(range(50))
    assert stream[50:100] != list(range(50))
    assert stream[50:100] != stream[100:150]
    assert stream[50:100] == epoch_order(50, 3, 1).tolist()


def test_a_step_that_reaches_into_the_next_epoch_waits_for_all_windows() -> None:
    plan = make_plan()
    all_but_last = make_known(50, windows=4)
    assert plan.step(2, plan.stream(all_but_last)) is not None
    assert plan.step(4, plan.stream(all_but_last)) is None
    step = plan.step(4, plan.stream(make_known(50)))
    assert step is not None
    assert step.samples[:2] == (48, 49)


def test_max_steps_goes_through_the_data_as_often_as_it_takes() -> None:
    steps = all_samples(make_plan(epochs=None, max_steps=20), 7)
    assert len(steps) == 20
    assert all(len(step) == 12 for step in steps)
    counts = Counter(number for step in steps for number in step)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_stages_shuffle_differently() -> None:
    assert all_samples(make_plan(), 50)[8] != all_samples(make_plan(stage=1), 50)[8]


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    order = epoch_order(1000, 0, 0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == epoch_order(1000, 0, 0).tolist()
    assert order.tolist() != epoch_order(1000, 1, 0).tolist()
    assert order.tolist() != epoch_order(1000, 0, 1).tolist()


WEIGHTS = {"set-0": 0.5, "set-1": 2.0, "set-2": 0.3}


@pytest.mark.parametrize("seed", range(12))
def test_any_plan_is_decided_by_committed_windows_alone_and_keeps_its_counts(seed: int) -> None:
    """Random settings: what partly committed windows decide, all windows decide the same, and nothing is lost."""
    rng = random.Random(seed)
    plan = make_plan(
        seed=seed,
        global_batch_size=4 * rng.randint(1, 4),
        micro_batch_size=2,
        epochs=rng.randint(1, 7),
        pack_tokens=rng.choice([None, PACK_TOKENS, 200]),
        length_grouping=rng.random() < 0.5,
        weights=rng.choice([{}, WEIGHTS]),
    )
    size, window_size = rng.randint(30, 150), rng.randint(4, 30)
    known = make_known(size, num_sources=4, window_size=window_size)
    steps = all_steps(plan, known)
    for windows in range(len(known.window_ends)):
        stream = plan.stream(make_known(size, num_sources=4, window_size=window_size, windows=windows))
        early = [plan.step(index, stream) for index in range(len(steps)) if index < windows * 2]
        assert all(one is None or one == steps[one.index] for one in early), "a step never changes"
    _check_counts(plan, known, steps)
    if plan.pack_tokens is not None:
        rows = [sum(known.num_tokens[list(slot)]) for step in steps for slot in step.slots]
        assert max(rows) <= plan.pack_tokens


def _check_counts(plan: StagePlan, known: KnownSamples, steps: list[StepPlan]) -> None:
    assert plan.epochs is not None
    drawn = Counter(number for step in steps for number in step.samples)
    by_source: Counter[str] = Counter()
    for number, source in enumerate(known.sources.tolist()):
        name = known.source_names[source]
        by_source[name] += 1
        assert abs(drawn[number] - plan.weights.get(name, 1.0) * plan.epochs) < 1
    total = 0
    for name, count in by_source.items():
        mine = sum(drawn[number] for number in range(len(known)) if known.source_names[known.sources[number]] == name)
        assert abs(mine - plan.weights.get(name, 1.0) * plan.epochs * count) < plan.epochs
        total += mine
    assert sum(len(step.samples) for step in steps) == total
    assert plan.num_steps(by_source) == len(steps), "known before the first window"


def test_a_source_of_weight_one_half_gives_one_half_and_then_the_other() -> None:
    known = make_known(40)
    plan = make_plan(weights={"set-0": 0.5}, epochs=4, global_batch_size=20, micro_batch_size=10)
    first, second, third, fourth = (set(step.samples) for step in all_steps(plan, known))
    assert first | second == third | fourth == set(range(40))
    assert len(first) == len(second) == 20
    assert first == third


def test_a_source_of_weight_two_comes_twice_and_not_at_once() -> None:
    known = make_known(20, window_size=10)
    [step] = all_steps(make_plan(weights={"set-0": 2}, epochs=1, global_batch_size=60), known)
    assert step.samples == (*range(10), *range(10), *range(10, 20), *range(10, 20))


def test_weights_of_unknown_sources_are_refused() -> None:
    check_weights({"a": 2.0}, {"a": 3, "b": 4})
    check_weights(None, {})
    with pytest.raises(ConfigError, match=r"c\.json; the sources of this store are a, b"):
        check_weights({"c.json": 2.0}, {"a": 3, "b": 4})


def test_weights_count_as_they_are_written() -> None:
    known = make_known(100)
    plan = make_plan(weights={"set-0": 0.1}, epochs=30, global_batch_size=1, micro_batch_size=1)
    assert plan.num_steps({"set-0": 100}) == 300 == 30 * 100 * Fraction("0.1")
    assert set(Counter(number for step in all_steps(plan, known) for number in step.samples).values()) == {3}


def test_length_grouping_halves_the_padding_and_still_shuffles() -> None:
    known = make_known(12 * GROUPED_BATCHES * 2)

    def padding(plan: StagePlan) -> float:
        rows = [known.num_tokens[list(slot)] for step in all_steps(plan, known) for slot in step.slots]
        return sum(int(row.max() * len(row) - row.sum()) for row in rows)

    grouped = make_plan(length_grouping=True, epochs=1)
    assert padding(grouped) < 0.5 * padding(make_plan(epochs=1))
    longest = [max(known.num_tokens[list(step.samples)]) for step in all_steps(grouped, known)]
    assert longest[:GROUPED_BATCHES] != sorted(longest[:GROUPED_BATCHES], reverse=True)


def test_packing_is_tight_stable_and_keeps_every_sample() -> None:
    assert pack([3, 5, 2, 5, 1], 8) == [[1, 0], [3, 2, 4]]
    assert pack([], 8) == []
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    rows = pack(lengths, 128)
    assert rows == pack(lengths, 128)
    assert sorted(place for row in rows for place in row) == list(range(300))
    assert max(sum(lengths[place] for place in row) for row in rows) <= 128
    assert len(rows) <= 1.05 * sum(lengths) / 128 + 1


def test_the_hash_follows_batches_and_lengths_and_nothing_else() -> None:
    known, plan = make_known(50), make_plan()

    def hashes(plan: StagePlan, known: KnownSamples, store: str = "f") -> list[str]:
        digest = PlanDigest(plan, store)
        return [digest.add(np.array(step.samples), known) for step in all_steps(plan, known)]

    there = hashes(plan, known)
    assert len(set(there)) == len(there)
    assert hashes(make_plan(micro_batch_size=6), known) == there, "slots are no part of it"
    assert hashes(plan, known, "g")[0] != there[0]
    num_tokens = known.num_tokens.copy()
    num_tokens[30] += 1
    changed = KnownSamples(
        num_tokens, known.num_label_tokens, known.sources, known.source_names, known.window_ends, known.complete
    )
    after = hashes(plan, changed)
    assert after[:2] == there[:2]
    assert after[2] != there[2]
