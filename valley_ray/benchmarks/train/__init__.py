"""What training costs: packed against padded batches, a worker fed in three modes, steps of a model of a real shape."""

from collections.abc import Callable

from valley_ray.benchmarks.train.config import TrainCost


def train_numbers(config: TrainCost, say: Callable[[str], None]) -> dict[str, object]:
    """What jobs/benchmark_train.py reports, on one thread of torch; `say` gets lines of progress.

    Raises ConfigError for what cannot be run.
    """
    import torch

    torch.set_num_threads(1)
    if config.model != "small":
        from valley_ray.benchmarks.train.large import large_numbers

        return large_numbers(config, say=say)
    from valley_ray.benchmarks.train.feeding import feeding_numbers
    from valley_ray.benchmarks.train.packing import packing_numbers

    return packing_numbers(config, say=say) | feeding_numbers(config, say=say)


__all__ = ["TrainCost", "train_numbers"]
