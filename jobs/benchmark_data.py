"""What decoding costs: our decoder against decord + PIL + numpy, and Ray against a plain loop and a pool of processes.

python jobs/benchmark_data.py [key=value ...]

Options: num_rounds=5 num_rounds_real=15 num_clips=2 clip_s=60 videos=../shared/videos, and of the second half
num_videos=408 num_rounds_prepare=3. First the decoder alone, on real videos and on generated 1080p clips with long
groups of pictures, with 3 B-frames and with none; then `prepare` over many videos. Less than ten minutes on two free
cores. The last line of stdout is one JSON object:
cpu_ratio_*           CPU per video of the reference over ours
ray_cpu_efficiency    CPU of a plain loop of our decoder over that of prepare: driver, workers and decoding children
ray_wall_vs_pool      wall time of multiprocessing's Pool(2) over that of prepare on two CPUs, both started and warm
second_epoch_decodes  clips that another plan over decoded videos decodes again
"""

import sys
from typing import Any

from valley_ray.benchmarks.job import Benchmark, run_job


def benchmark() -> Benchmark[Any]:
    """Imported when it is run."""
    from valley_ray.benchmarks.prepare_cost import PrepareCost, data_numbers

    return PrepareCost, data_numbers


if __name__ == "__main__":
    sys.exit(run_job("benchmark_data", __doc__, benchmark))
