"""The global plan: step → slots → samples, the same on every rank and for every world size.

Samples are numbered by their place among the ok rows of the committed windows, in commit order; failed rows have no
number. Epoch 0 of a stage follows that order (which the driver already drew from `epoch_order` before the pipeline
worked through it), so training starts while later windows are still being made; later epochs are seeded
permutations. The epochs of a stage form one stream that is cut into global batches: a batch may end one epoch and
begin the next, and only the last batch of a stage may be smaller, so no sample is dropped or repeated within an
epoch. Knows no files, no torch and no ranks beyond `slot mod world`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_samples: int, seed: int, epoch: int, *, stage: int = 0) -> NDArray[np.int64]:
    """A permutation of ``range(num_samples)``, int64 [num_samples], a function of its arguments alone.

    The driver hands the one of epoch 0 to the data pipeline (over the rows of the samples table).
    """
    return np.random.default_rng([seed, stage, epoch]).permutation(num_samples).astype(np.int64)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: the global batch, cut into micro-batches ("slots")."""

    index: int
    slots: tuple[tuple[int, ...], ...]
    """Sample numbers of each slot; only the last slot may be short."""

    @property
    def samples(self) -> tuple[int, ...]:
        """Sample numbers of the whole global batch, in order."""
        return tuple(number for slot in self.slots for number in slot)

    def of_rank(self, rank: int, world: int, num_micro_batches: int) -> tuple[tuple[int, ...], ...]:
        """The slots of one rank, filled up with empty (zero-weight) ones to `num_micro_batches`.

        Every rank runs the same number of micro-batches in every step, so no collective is ever left waiting.
        """
        mine = self.slots[rank::world]
        assert len(mine) <= num_micro_batches, f"{len(mine)} slots do not fit {num_micro_batches} micro-batches"
        return mine + ((),) * (num_micro_batches - len(mine))


@dataclass(frozen=True)
class StagePlan:
    """All steps of one stage."""

    stage: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    epochs: int | None
    max_steps: int | None

    def num_micro_batches(self, world: int) -> int:
        """Micro-batches of every rank in every step (gradient accumulation)."""
        slots = self.global_batch_size // self.micro_batch_size
        return -(-slots // world)

    def num_steps(self, num_samples: int) -> int:
        """Steps of the stage over `num_samples` ok samples."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None, "a stage has epochs or max_steps"
        return -(-self.epochs * num_samples // self.global_batch_size)

    def samples_needed(self, step: int) -> int:
        """How many samples of epoch 0 decide this step. With fewer committed, all windows must be known first."""
        return (step + 1) * self.global_batch_size

    def step(self, index: int, *, num_known: int, complete: bool) -> StepPlan | None:
        """The plan of one step, or None while the committed windows do not decide it yet.

        Args:
            index: step within the stage, below `num_steps`.
            num_known: ok samples committed so far.
            complete: whether that is all of them.
        """
        first = index * self.global_batch_size
        last = first + self.global_batch_size
        if not complete:
            return self._cut(index, range(first, last)) if last <= num_known else None
        if self.epochs is not None:
            last = min(last, self.epochs * num_known)
        assert first < last, f"step {index} is past the end of the stage"
        return self._cut(index, self._numbers(first, last, num_known))

    def _numbers(self, first: int, last: int, num_samples: int) -> list[int]:
        numbers: list[int] = []
        while first < last:
            epoch, offset = divmod(first, num_samples)
            count = min(last - first, num_samples - offset)
            if epoch == 0:
                numbers.extend(range(offset, offset + count))
            else:
                order = _known_order(num_samples, self.seed, epoch, self.stage)
                numbers.extend(order[offset : offset + count].tolist())
            first += count
        return numbers

    def _cut(self, index: int, numbers: range | list[int]) -> StepPlan:
        size = self.micro_batch_size
        slots = tuple(tuple(numbers[start : start + size]) for start in range(0, len(numbers), size))
        return StepPlan(index=index, slots=slots)


@lru_cache(maxsize=2)
def _known_order(num_samples: int, seed: int, epoch: int, stage: int) -> NDArray[np.int64]:
    """Kept, since every step of an epoch needs it: 700,000 samples take milliseconds to shuffle."""
    return epoch_order(num_samples, seed, epoch, stage=stage)
