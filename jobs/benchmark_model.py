"""CPU time of our forward pass against the same transformers modules called by hand: python jobs/benchmark_model.py

Options as key=value (num_rounds=7 batch_size=2 num_frames=8 hidden_size=384). One thread, about two minutes. The last
line of stdout is one JSON object; `forward_vs_by_hand` is the one for a batch of videos with mean pooling.
"""

import sys
from typing import Any

from valley_ray.benchmarks.job import Benchmark, run_job


def benchmark() -> Benchmark[Any]:
    """Imported when it is run."""
    from valley_ray.benchmarks.forward_cost import ForwardCost, forward_numbers

    return ForwardCost, forward_numbers


if __name__ == "__main__":
    sys.exit(run_job("benchmark_model", __doc__, benchmark))
