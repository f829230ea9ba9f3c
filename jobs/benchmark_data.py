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

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is imported

from valley_ray.config import load_config
from valley_ray.errors import ValleyError
from valley_ray.evaluate.decode_cost import decode_numbers
from valley_ray.evaluate.prepare_cost import PrepareCost, prepare_numbers


def main() -> int:
    """Exit status 0, or 2 with one line on stderr for a user's mistake."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return 0
    try:
        config = load_config(PrepareCost, overrides=sys.argv[1:])
        decoding = decode_numbers(config, say=_say)
        numbers = decoding | prepare_numbers(config, say=_say)
    except ValleyError as error:
        print(f"benchmark_data: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(numbers))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
