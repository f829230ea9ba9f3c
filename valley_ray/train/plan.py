"""The global plan: step → slots → samples, the same on every rank and for every world size.

The draws of a stage (order.py) are cut into global batches: a batch may end one epoch and begin the next, and only the
last batch of a stage may be smaller. A batch is cut into slots, one micro-batch each, and the slot's number says which
rank takes it: `slot mod world`. What is in a batch or in a slot is decided by the seed and the committed windows alone.
Knows no files, no torch and no ranks beyond that.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from valley_ray.train.config import TrainConfig
from valley_ray.train.order import KnownSamples, SampleStream, draws_of, exact
from valley_ray.train.order import epoch_order as epoch_order

GROUPED_BATCHES = 8
"""Global batches among which samples are grouped by length: in overlap mode, the first step waits for so many."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: the global batch, cut into micro-batches ("slots")."""

    index: int
    slots: tuple[tuple[int, ...], ...]
    """Sample numbers of each slot. Their number differs from step to step where samples are packed."""

    @property
    def samples(self) -> tuple[int, ...]:
        """Sample numbers of the whole global batch."""
        return tuple(number for slot in self.slots for number in slot)

    def of_rank(self, rank: int, world: int) -> tuple[tuple[int, ...], ...]:
        """The slots of one rank, filled up with empty (zero-weight) ones.

        Every rank runs as many micro-batches as the others in every step, so no collective is ever left waiting.
        """
        mine = self.slots[rank::world]
        return mine + ((),) * (-(-len(self.slots) // world) - len(mine))


@dataclass(frozen=True)
class StagePlan:
    """All steps of one stage."""

    stage: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    """Samples of a slot, where they are not packed."""
    epochs: int | None
    max_steps: int | None
    pack_tokens: int | None = None
    """Most tokens of a slot; None: samples are padded."""
    length_grouping: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    """Draws per epoch of the samples of a source, 1 where none is named."""

    @classmethod
    def of_stage(cls, config: TrainConfig, number: int) -> "StagePlan":
        """The plan of stage `number` of a run."""
        stage = config.stages[number]
        return cls(
            stage=number,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            epochs=stage.epochs,
            max_steps=stage.max_steps,
            pack_tokens=config.pack_tokens,
            length_grouping=config.length_grouping,
            weights=config.data.weights or {},
        )

    def num_steps(self, num_samples: int | Mapping[str, int]) -> int:
        """Steps of the stage over so many samples, given by source where there are weights."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None, "a stage has epochs or max_steps"
        counts = num_samples if isinstance(num_samples, Mapping) else {"": num_samples}
        weights = {name: exact(self.weights.get(name, 1.0)) for name in counts}
        return self._steps_of(
            sum(draws_of(counts[name], weights[name], epoch) for name in counts for epoch in range(self.epochs))
        )

    def stream(self, known: KnownSamples) -> SampleStream:
        """The draws of this stage, as far as the windows in `known` decide them."""
        return SampleStream(known, seed=self.seed, stage=self.stage, weights=self.weights)

    def steps_in(self, stream: SampleStream) -> int | None:
        """Steps of the stage; None while that depends on windows to come."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None, "a stage has epochs or max_steps"
        return self._steps_of(stream.num_draws(self.epochs)) if stream.known.complete else None

    def step(self, index: int, stream: SampleStream) -> StepPlan | None:
        """The plan of one step, or None while the windows of `stream` do not decide it yet."""
        numbers = self.batch(index, stream)
        return None if numbers is None else StepPlan(index, self.cut(numbers, stream.known))

    def batch(self, index: int, stream: SampleStream) -> NDArray[np.int64] | None:
        """Sample numbers of the global batch of one step, or None while they are not decided."""
        size, count = self.global_batch_size, GROUPED_BATCHES if self.length_grouping else 1
        group, place = divmod(index, count)
        last = self._end(stream, (group + 1) * count * size)
        assert index * size < last, f"step {index} is past the end of the stage"
        numbers = stream.take(group * count * size, last)
        if numbers is None or not self.length_grouping:
            return numbers
        batches = self._grouped(group, numbers, stream.known.num_tokens)
        return batches[place]

    def cut(self, batch: NDArray[np.int64], known: KnownSamples) -> tuple[tuple[int, ...], ...]:
        """A global batch as slots: packed into rows of `pack_tokens`, or `micro_batch_size` samples each."""
        if self.pack_tokens is not None:
            rows = pack(known.num_tokens[batch].tolist(), self.pack_tokens)
            return tuple(tuple(batch[row].tolist()) for row in rows)
        size = self.micro_batch_size
        return tuple(tuple(batch[first : first + size].tolist()) for first in range(0, len(batch), size))

    def _end(self, stream: SampleStream, last: int) -> int:
        if self.max_steps is not None:
            return min(last, self.max_steps * self.global_batch_size)
        if not stream.known.complete:
            return last
        assert self.epochs is not None, "a stage has epochs or max_steps"
        return min(last, stream.num_draws(self.epochs))

    def _grouped(
        self, group: int, numbers: NDArray[np.int64], num_tokens: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        """Batches of like lengths in a seeded order, a smaller one at the end."""
        size = self.global_batch_size
        by_length = numbers[np.argsort(-num_tokens[numbers], kind="stable")]
        batches = [by_length[first : first + size] for first in range(0, len(by_length), size)]
        num_full = len(numbers) // size
        order = np.random.default_rng([self.seed, self.stage, group, 1]).permutation(num_full)
        return [batches[place] for place in order] + batches[num_full:]

    def _steps_of(self, num_draws: int) -> int:
        return -(-num_draws // self.global_batch_size)


class PlanDigest:
    """A hash of all global batches up to a step: which samples, of how many tokens."""

    def __init__(self, plan: StagePlan, store_fingerprint: str) -> None:
        parts = (plan.stage, plan.seed, plan.global_batch_size, plan.pack_tokens, store_fingerprint)
        self._hash = hashlib.blake2b(repr(parts).encode(), digest_size=8)

    def add(self, numbers: NDArray[np.int64], known: KnownSamples) -> str:
        """Take in the next global batch; returns the hash up to it."""
        for values in (numbers, known.num_tokens[numbers], known.num_label_tokens[numbers]):
            self._hash.update(np.ascontiguousarray(values, np.int64).tobytes())
        return self._hash.hexdigest()


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Put samples of `lengths` into as few rows of at most `budget` tokens as best-fit decreasing finds.

    Returns places in `lengths`, row after row; a function of its arguments alone (of equal samples the earlier one
    comes first, of equal rows the earlier one is filled).
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        assert lengths[place] <= budget, f"a sample of {lengths[place]} tokens does not fit {budget=}"
        fitting = [row for row, room in enumerate(left) if room >= lengths[place]]
        if fitting:
            row = min(fitting, key=left.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            left.append(budget)
        rows[row].append(place)
        left[row] -= lengths[place]
    return rows
