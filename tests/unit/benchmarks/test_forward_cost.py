"""The benchmark of the forward pass: what it compares is equal, and it says so where it is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from valley_ray.benchmarks import forward_cost
from valley_ray.benchmarks.forward_cost import POOLINGS, ForwardCost, measure

ROOT = Path(__file__).parents[3]
SMALL = ForwardCost(num_rounds=1, batch_size=2, num_frames=3, num_text_tokens=8, hidden_size=128)


def test_every_pooling_and_text_are_equal_by_hand_and_timed() -> None:
    costs = dict(measure(SMALL))
    assert costs.keys() == {*POOLINGS, "text_only"}
    assert all(cost.ours_cpu_ms > 0 and cost.by_hand_cpu_ms > 0 for cost in costs.values())


def test_other_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_frame(core: object, patches: torch.Tensor) -> torch.Tensor:
        return patches[:, 0]

    monkeypatch.setattr(forward_cost, "_pooled", first_frame)
    with pytest.raises(AssertionError, match="not close"):
        next(measure(SMALL))


@pytest.mark.slow
def test_the_job_ends_with_one_json_line() -> None:
    options = ["num_rounds=1", "batch_size=1", "num_frames=1", "num_text_tokens=4", "hidden_size=128"]
    command = [sys.executable, "jobs/benchmark_model.py", *options]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(shown.stdout.splitlines()[-1])
    assert report["forward_vs_by_hand"] == report["cases"]["mean"]["forward_vs_by_hand"]
    mistake = subprocess.run([*command, "rounds=3"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (mistake.returncode, mistake.stdout) == (2, "")
    assert "did you mean 'num_rounds'" in mistake.stderr
