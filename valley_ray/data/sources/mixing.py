"""The order in which samples of several sources come, by weight. Knows numbers of samples, and no sample."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from valley_ray.errors import DataError


def mixing_order(weights: Sequence[float], counts: Sequence[int], seed: int | None) -> npt.NDArray[np.int64]:
    """An order of all samples, each once, in which the sources are mixed evenly and by weight: int64 [sum(counts)].

    Samples are numbered source after source. Equal weights spread every source over the whole order, in proportion to
    its size; a source of twice the weight of the others comes twice as densely and is used up halfway. Up to there, no
    beginning of the order is more than one sample away from that share.

    Args:
        weights: one per source, above 0.
        counts: samples per source.
        seed: shuffles the samples within each source; None: their own order.

    Raises:
        DataError: not one weight per source, or one that is not above 0.
    """
    if len(weights) != len(counts) or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"mixing needs one weight above 0 per source, got {list(weights)} for {len(counts)} source(s)")
    generator = np.random.default_rng(seed) if seed is not None else None
    firsts = np.concatenate([[0], np.cumsum(counts)])[: len(counts)].astype(np.int64)
    rows = [
        first + (generator.permutation(count) if generator else np.arange(count))
        for first, count in zip(firsts, counts, strict=True)
    ]
    # Sample k of a source is due when its source has come to (k + 1/2) of its own length.
    due = [(np.arange(count) + 0.5) / (count * weight) for weight, count in zip(weights, counts, strict=True) if count]
    if not due:
        return np.zeros(0, np.int64)
    return np.concatenate(rows)[np.argsort(np.concatenate(due), kind="stable")].astype(np.int64)
