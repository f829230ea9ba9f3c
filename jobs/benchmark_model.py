"""CPU time of our forward pass against the same transformers modules called by hand: python jobs/benchmark_model.py

Options as key=value (num_rounds=7 batch_size=2 num_frames=8 hidden_size=384). One thread, about two minutes. The last
line of stdout is one JSON object; `forward_vs_by_hand` is the one for a batch of videos with mean pooling.
"""

import json
import sys
from dataclasses import asdict

from valley_ray.config import load_config
from valley_ray.errors import ValleyError


def main() -> int:
    """Exit status 0, or 2 with one line on stderr for a user's mistake."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return 0
    import torch

    from valley_ray.evaluate.forward_cost import ForwardCost, measure

    try:
        config = load_config(ForwardCost, overrides=sys.argv[1:])
    except ValleyError as error:
        print(f"benchmark_model: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    print(f"{'':<12}{'ours, ms':>10}{'by hand':>10}{'ratio':>8}")
    costs = {}
    for name, cost in measure(config):
        costs[name] = cost
        print(f"{name:<12}{cost.ours_cpu_ms:>10.1f}{cost.by_hand_cpu_ms:>10.1f}{cost.forward_vs_by_hand:>8.3f}")
    shown = {
        "forward_vs_by_hand": costs["mean"].forward_vs_by_hand,
        "cases": {name: asdict(cost) for name, cost in costs.items()},
        "config": config.model_dump(),
        "torch": torch.__version__,
    }
    print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
