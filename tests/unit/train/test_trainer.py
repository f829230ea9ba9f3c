"""The driver's half: where workers fit, and what a run that has ended already says. No Ray is started."""

import dataclasses
import math
from pathlib import Path

import pytest
from train_runs import make_config

from valley_ray.train.metrics import MetricsLog, StepMetrics
from valley_ray.train.trainer import last_loss, num_placeable


@pytest.mark.parametrize(
    ("changes", "nodes", "room"),
    [
        ({"cpus_per_worker": 3}, [{"CPU": 2.0}, {"CPU": 2.0}], 0),
        ({"cpus_per_worker": 0.75}, [{"CPU": 2.0}, {"CPU": 1.0}, {"memory": 1.0}], 3),
        ({"cpus_per_worker": 0.1}, [{"CPU": 0.3}], 3),
        ({"use_gpu": True}, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], 2),
    ],
)
def test_a_worker_stands_on_one_node(
    changes: dict[str, float], nodes: list[dict[str, float]], room: int, tmp_path: Path
) -> None:
    assert num_placeable(make_config(tmp_path, tmp_path, tmp_path, "a", **changes), nodes) == room


def test_a_run_that_had_ended_tells_the_loss_of_its_last_step(tmp_path: Path) -> None:
    assert last_loss(2.0, tmp_path / "metrics.jsonl") == 2.0
    assert math.isnan(last_loss(math.nan, tmp_path / "metrics.jsonl"))
    log = MetricsLog(tmp_path, last_step=0)
    values = {field.name: 0 for field in dataclasses.fields(StepMetrics)}
    for step in (1, 2):
        log.write(StepMetrics(**values | {"step": step, "stage": "a", "loss": 3.0 / step, "learning_rate": 0.0}))
    assert last_loss(math.nan, log.path) == 1.5
