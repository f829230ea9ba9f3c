"""CPU time per video of our decoder against decord + PIL + numpy: python jobs/benchmark_data.py

Options as key=value (num_rounds=5 num_rounds_real=15 num_clips=2 clip_s=60 videos=../shared/videos). Real videos, and
generated 1080p clips with long groups of pictures, with 3 B-frames and with none; about four minutes on free cores,
less when the clips are there already. The last line of stdout is one JSON object; ratios are CPU per video of the
reference over ours.
"""

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is imported

from valley_ray.config import load_config
from valley_ray.errors import ValleyError
from valley_ray.evaluate.decode_cost import DecodeCost, decode_numbers


def main() -> int:
    """Exit status 0, or 2 with one line on stderr for a user's mistake."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return 0
    try:
        config = load_config(DecodeCost, overrides=sys.argv[1:])
        numbers = decode_numbers(config, say=lambda line: print(line, flush=True))
    except ValleyError as error:
        print(f"benchmark_data: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
