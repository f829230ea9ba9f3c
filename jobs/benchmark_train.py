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

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is imported

from valley_ray.config import load_config
from valley_ray.errors import ValleyError
from valley_ray.train.cost.config import TrainCost


def main() -> int:
    """Exit status 0, or 2 with one line on stderr for a user's mistake."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return 0
    import torch

    from valley_ray.train.cost import train_numbers

    try:
        config = load_config(TrainCost, overrides=sys.argv[1:])
        torch.set_num_threads(1)
        numbers = train_numbers(config, say=_say)
    except ValleyError as error:
        print(f"benchmark_train: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(numbers))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
