"""What training costs: packed against padded batches, a worker fed in three modes, steps of a model of a real shape."""

from collections.abc import Callable

from valley_ray.train.cost.config import TrainCost


def train_numbers(config: TrainCost, *, say: Callable[[str], None]) -> dict[str, object]:
    """What jobs/benchmark_train.py reports; `say` gets lines of progress. Raises ConfigError for what cannot be run."""
    if config.model != "small":
        from valley_ray.train.cost.large import large_numbers

        return large_numbers(config, say=say)
    from valley_ray.train.cost.feeding import feeding_numbers
    from valley_ray.train.cost.packing import packing_numbers

    return packing_numbers(config, say=say) | feeding_numbers(config, say=say)
