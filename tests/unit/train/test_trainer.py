"""Workers that fit into a cluster's sum of resources may fit on none of its nodes."""

from pathlib import Path

import pytest
from train_runs import make_config

from valley_ray.train.trainer import num_placeable


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
