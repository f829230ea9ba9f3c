"""What training costs: packed against padded batches, and how a worker is fed.

python jobs/benchmark_train.py [key=value ...]

Options: num_rounds=3 num_samples=256 num_samples_in_process=48 num_rounds_packing=5. One worker, less than 15 minutes
on two free cores. The last line of stdout is one JSON object:
packed_vs_padded       tokens per CPU-second of packed rows over padded batches of 16 with half of them padding
shards_vs_in_process   tokens/s from shards over those of a loop that decodes by itself with decord, PIL and numpy
overlap_vs_in_process  the same with the pipeline decoding beside the worker, its start included
stall_share_shards     share of its time that the loop waits for data, from shards
decode_share           share of decoding in a step of the loop that decodes by itself
tokens_per_s           of the three modes
With model=llama7b-shape device=cuda: packed steps of a random model of that shape in bf16, tokens_per_s and mfu;
further options stage=valley-stage2 pack_tokens=4096 num_rows=4 num_steps=8 gradient_checkpointing=true offload=false
peak_flops=null.
"""

import sys
from typing import Any

from valley_ray.benchmarks.job import Benchmark, run_job


def benchmark() -> Benchmark[Any]:
    """Imported when it is run."""
    from valley_ray.benchmarks.train import TrainCost, train_numbers

    return TrainCost, train_numbers


if __name__ == "__main__":
    sys.exit(run_job("benchmark_train", __doc__, benchmark))
