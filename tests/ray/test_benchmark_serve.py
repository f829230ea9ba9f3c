"""What benchmark_serve says, in small: every key is there, and both sides of each comparison did the same work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from valley_ray.benchmarks.serve import ServeCost

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_job_ends_with_every_key(tmp_path: Path) -> None:
    options = ["num_rounds=1", "num_new_tokens=4", "num_prompt_tokens=16", "vocab_size=97", "hidden_size=64"]
    options += ["num_layers=2", "server_hidden_size=64", "server_num_layers=2", "clip_s=0.5", "num_pulls=10"]
    command = [sys.executable, "jobs/benchmark_serve.py", *options, f"folder={tmp_path}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert shown.returncode == 0, shown.stderr[-2000:]
    numbers = json.loads(shown.stdout.splitlines()[-1])
    for kind in ("slots", "vllm"):
        by_count = numbers[f"{kind}_vs_generate"]
        assert by_count is None if kind == "vllm" and by_count is None else set(by_count) == {"1", "4", "16"}
        assert all(ratio > 0 for ratio in (by_count or {}).values())
    for key in ("server_vs_worker_16", "server_vs_worker_16_distinct", "warm_ttft_ratio", "split_vs_colocated"):
        assert isinstance(numbers[key], float), key
        assert numbers[key] > 0
    assert 0 < numbers["hop_ms_p50"] <= numbers["hop_ms_p95"]
    assert numbers["warm_encoder_calls"] == 0
    for case in ("4 videos", "all distinct"):
        assert set(numbers["server_and_worker"][case]) == {"split", "worker"}
        assert set(numbers["shapes"][case]) == {"split", "colocated"}
    assert ServeCost.model_validate(numbers["config"]).num_new_tokens == 4
