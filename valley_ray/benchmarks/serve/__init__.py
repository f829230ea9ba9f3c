"""What serving costs: engines beside `generate`, our server beside a worker as the original's, and what its parts cost.

engines   CPU and wall time per token (engine_cost.py)
worker    tokens per second of sixteen clients, beside a worker that answers one request at a time (worker.py)
video     time to the first text about a new video and about one that was seen before
shapes    three deployments beside one that holds them all, on the same two cores
hops      the way from decoder to sampler and back (hops.py)
"""

import os
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from valley_ray.benchmarks.engine_cost import engine_numbers
from valley_ray.benchmarks.job import Say
from valley_ray.benchmarks.serve.config import ServeCost

if TYPE_CHECKING:
    from valley_ray.engine.open import EngineKind

NUM_CPUS = 2
_KEYS = (
    "slots_vs_generate",
    "vllm_vs_generate",
    "server_vs_worker_16",
    "server_vs_worker_16_distinct",
    "warm_ttft_ratio",
    "split_vs_colocated",
    "hop_ms_p50",
)


def serve_numbers(config: ServeCost, say: Say) -> dict[str, object]:
    """What jobs/benchmark_serve.py reports: ratios, and the medians behind them. A key is null where it has no number.

    Everything runs on two of the CPUs that this process may use.
    """
    _take_cpus(say)
    numbers: dict[str, object] = dict.fromkeys(_KEYS)
    if "engines" in config.parts:
        numbers |= _engines(config, say)
    if {"worker", "video", "shapes", "hops"} & set(config.parts):
        from valley_ray.benchmarks.serve.servers import server_numbers

        numbers |= server_numbers(config, say)
    return numbers | {"config": config.model_dump(mode="json"), "torch": torch.__version__}


def _take_cpus(say: Say) -> None:
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))[:NUM_CPUS]
        os.sched_setaffinity(0, cpus)
        say(f"on CPUs {cpus}")


def _engines(config: ServeCost, say: Say) -> dict[str, object]:
    torch.set_num_threads(config.num_threads)
    kinds: list[EngineKind] = ["slots", "vllm"] if find_spec("vllm") else ["slots"]
    costs = engine_numbers(config, kinds, say=say)
    return {
        f"{name}_vs_generate": {count: cost.times_generate for count, cost in by_count.items()}
        for name, by_count in costs.items()
        if name != "generate"
    } | {"engines": {name: {count: asdict(cost) for count, cost in one.items()} for name, one in costs.items()}}


__all__ = ["ServeCost", "serve_numbers"]
