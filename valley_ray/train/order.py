"""The order in which samples are drawn: committed windows and weights → a stream of sample numbers.

Samples are numbered by their place among the usable rows of the committed windows, in commit order. A stream is whole
epochs, one after another. In an epoch, a source of weight w gives each of its samples w times: twice for 2, in every
second epoch for 0.5. Knows no files, no batches, no ranks.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from valley_ray.errors import ConfigError

KEPT_EPOCHS = 2
"""Epochs whose order is kept: a batch may end one and begin the next."""


def epoch_order(num_samples: int, seed: int, epoch: int, *, stage: int = 0) -> NDArray[np.int64]:
    """A permutation of ``range(num_samples)``, int64 [num_samples], a function of its arguments alone.

    The driver hands the one of epoch 0 to the data pipeline (over the rows of the samples table).
    """
    return np.random.default_rng([seed, stage, epoch]).permutation(num_samples).astype(np.int64)


@dataclass(frozen=True, eq=False)
class KnownSamples:
    """What the windows committed so far say of their samples, by number."""

    num_tokens: NDArray[np.int64]
    """int64 [N]"""
    num_label_tokens: NDArray[np.int64]
    """int64 [N]"""
    sources: NDArray[np.int64]
    """int64 [N], places in `source_names`"""
    source_names: tuple[str, ...]
    window_ends: NDArray[np.int64]
    """int64 [W]: how many samples there are up to the end of each window"""
    complete: bool
    """Whether these windows are all."""

    def __len__(self) -> int:
        return len(self.num_tokens)

    @functools.cached_property
    def ordinals(self) -> NDArray[np.int64]:
        """int64 [N]: how many samples of the same source come before each."""
        ordinals = np.zeros(len(self), np.int64)
        for source in range(len(self.source_names)):
            numbers = np.flatnonzero(self.sources == source)
            ordinals[numbers] = np.arange(len(numbers))
        return ordinals


def check_weights(weights: Mapping[str, float] | None, sources: Mapping[str, int]) -> None:
    """Raise ConfigError where `weights` name a source that a store (`StoreInfo.sources`) does not hold."""
    unknown = sorted(set(weights or ()) - set(sources))
    if unknown:
        held = ", ".join(sorted(sources)) or "none, it was made before windows named them; make it again"
        raise ConfigError(f"data.weights names {', '.join(unknown)}; the sources of this store are {held}")


class SampleStream:
    """Every draw of a stage, one after another.

    Epoch 0 follows the windows, so that its beginning is decided by the windows that are there; of a window, first
    draws of all samples come before second ones. Later epochs are seeded permutations and need all windows.
    """

    def __init__(self, known: KnownSamples, *, seed: int, stage: int, weights: Mapping[str, float]) -> None:
        self.known = known
        self._seed = seed
        self._stage = stage
        self._weights = [exact(weights.get(name, 1.0)) for name in known.source_names]
        self._counts_of_sources = np.bincount(known.sources, minlength=len(self._weights)).tolist()
        self._ends = [0]
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def num_draws(self, epochs: int) -> int:
        """Draws of so many epochs, of the windows that are known."""
        while len(self._ends) <= epochs:
            epoch = len(self._ends) - 1
            counts = zip(self._counts_of_sources, self._weights, strict=True)
            self._ends.append(self._ends[-1] + sum(draws_of(count, weight, epoch) for count, weight in counts))
        return self._ends[epochs]

    def take(self, first: int, last: int) -> NDArray[np.int64] | None:
        """Numbers of draws `first` to `last` (excluded), or None while the windows do not decide them all."""
        parts, epoch = [], 0
        while first < last:
            if epoch and not self.known.complete:
                return None
            start, end = self.num_draws(epoch), self.num_draws(epoch + 1)
            if first < end:
                parts.append(self._epoch(epoch)[first - start : last - start])
                first = min(last, end)
            epoch += 1
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            while len(self._epochs) >= KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        known = self.known
        counts = self._counts(epoch)
        numbers = np.repeat(np.arange(len(known)), counts)
        if epoch:
            return numbers[epoch_order(len(numbers), self._seed, epoch, stage=self._stage)]
        if not len(counts) or counts.max() <= 1:
            return numbers
        repeats = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
        windows = np.searchsorted(known.window_ends, numbers, side="right")
        return numbers[np.lexsort((numbers, repeats, windows))]

    def _counts(self, epoch: int) -> NDArray[np.int64]:
        """int64 [N]: how often each sample is drawn in `epoch`.

        Sample k of a source of weight w: floor(w (k + epoch + 1)) - floor(w (k + epoch)). Summed over the samples or
        over the epochs, only the ends remain: a source gives w times its size in every epoch, and a sample is drawn w
        times the number of epochs, both to within one.
        """
        counts = np.ones(len(self.known), np.int64)
        for source, weight in enumerate(self._weights):
            if weight != 1:
                mine = self.known.sources == source
                upto = [
                    weight.numerator * (self.known.ordinals[mine] + epoch + i) // weight.denominator for i in (0, 1)
                ]
                counts[mine] = upto[1] - upto[0]
        return counts


def exact(weight: float) -> Fraction:
    """The number that was written: 0.1 is a tenth, 0.333 is 333/1000."""
    return Fraction(str(weight))


def draws_of(num_samples: int, weight: Fraction, epoch: int) -> int:
    """Draws that a source of so many samples gives in one epoch."""
    return math.floor(weight * (num_samples + epoch)) - math.floor(weight * epoch)
