"""Nodes that come, go, and are taken away with notice: a training goes on with as many workers as there is room for."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from train_runs import attempts, losses, make_config
from train_store import make_store

from valley_ray.train import fit
from valley_ray.train.metrics import read_metrics
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

EXACT = 2e-6
PREEMPTION = 2
"""Reason of a drain, ray.core.generated.autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for workers, to which tests add nodes with room for one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store", tiny_valley, num_samples=50)


def stages(num_steps: int) -> tuple[StageConfig, ...]:
    return (StageConfig(name="all", trainable="valley-stage2", learning_rate=1e-3, max_steps=num_steps),)


def until(run: Path, step: int) -> None:
    """Return once `step` is logged."""
    deadline_s = time.monotonic() + 400
    while not (lines := read_metrics(run / "metrics.jsonl")) or lines[-1].step < step:
        assert time.monotonic() < deadline_s, f"step {step} was not made"
        time.sleep(0.01)


def test_a_run_follows_nodes_that_go_and_come(
    cluster: Cluster, tiny_valley: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "RESIZE_INTERVAL_S", 3.0)
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    values = {"stages": stages(600), "cpus_per_worker": 1, "checkpoint_every": 20, "num_workers": (1, 2)}
    config = make_config(tiny_valley, store, tmp_path, "elastic", **values)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, config)
        until(tmp_path / "elastic", 30)
        cluster.remove_node(second, allow_graceful=False)
        until(tmp_path / "elastic", 60)
        cluster.add_node(num_cpus=1)
        elastic = run.result()
    workers = [one["workers"] for one in attempts(tmp_path / "elastic")]
    assert workers[0] == workers[-1] == 2, workers
    assert 1 in workers
    fixed = train(config.model_copy(update={"num_workers": 1, "run_name": "fixed", "checkpoint_every": None}))
    ours, theirs = losses(read_metrics(elastic.metrics_path)), losses(read_metrics(fixed.metrics_path))
    assert len(ours) == 600
    assert ours[:60] == pytest.approx(theirs[:60], abs=EXACT, rel=0)


def test_a_node_that_is_taken_away_with_notice_costs_no_step(
    cluster: Cluster, tiny_valley: Path, store: Path, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config = make_config(
        tiny_valley, store, tmp_path, "drained", stages=stages(600), num_workers=1, cpus_per_worker=1, max_failures=0
    )
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, config)
        until(tmp_path / "drained", 20)
        drain(cluster, busy_node())
        run.result()
    first, second = attempts(tmp_path / "drained")
    assert (first["after_step"], second["after_step"] >= 20) == (0, True), "without any regular checkpoint"


def busy_node() -> str:
    """Id of the node that the worker runs on."""
    free = available_resources_per_node()
    (busy,) = (
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and free[node["NodeID"]].get("CPU", 0) < 1
    )
    return str(busy)


def drain(cluster: Cluster, node_id: str) -> None:
    deadline_ms = int((time.time() + 60) * 1000)
    accepted, reason = GcsClient(cluster.address).drain_node(node_id, PREEMPTION, "taken away", deadline_ms)
    assert accepted, reason
