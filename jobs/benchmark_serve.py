"""What serving costs: engines beside `generate`, the server beside a worker that answers one request at a time.

python jobs/benchmark_serve.py [key=value ...]

Options: num_rounds=5 parts=[engines,worker,video,shapes,hops] num_threads=1 clip_s=10. A model of 26 million parameters
behind HTTP, 16 clients, 64 new tokens, two CPUs, less than 20 minutes. The last line of stdout is one JSON object:
slots_vs_generate             CPU time per token of sequential `generate` over that of slots, at 1, 4 and 16 requests
                              at once; a LLaMA of 58 million parameters, 304 tokens in, 64 out
vllm_vs_generate              the same of vLLM, where it is installed
server_vs_worker_16           tokens per second of the server over those of a worker as the original's, four videos
server_vs_worker_16_distinct  the same where every request brings a video of its own
warm_ttft_ratio               time to the first text about a video that was seen before over that about a new one
split_vs_colocated            tokens per second of three deployments over those of one process, all videos distinct
hop_ms_p50                    decoder to encoder to sampler and back with no work inside, median in milliseconds
"""

import sys
from typing import Any

from valley_ray.benchmarks.job import Benchmark, run_job


def benchmark() -> Benchmark[Any]:
    """Imported when it is run."""
    from valley_ray.benchmarks.serve import ServeCost, serve_numbers

    return ServeCost, serve_numbers


if __name__ == "__main__":
    sys.exit(run_job("benchmark_serve", __doc__, benchmark))
