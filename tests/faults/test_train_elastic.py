"""Nodes that come, go, and are taken away with notice: a training goes on with as many workers as there is room for."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from train_runs import attempts, losses, make_config
from train_store import make_store, write_window

from valley_ray.processor import ValleyProcessor
from valley_ray.train import fit
from valley_ray.train.config import TrainConfig
from valley_ray.train.metrics import read_metrics
from valley_ray.train.run_folder import run_folder
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

EXACT = 2e-6
BATCH = 12
EVERY = 4
MOST_STEPS = 1000
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


class Samples:
    """A store of one step's samples per window, which no run overtakes: windows are committed as a test goes on."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = make_store(folder, model, num_samples=BATCH * MOST_STEPS, window_size=BATCH, num_committed=0)
        self._processor = ValleyProcessor.from_pretrained(model)
        self._num_steps = 0

    def commit(self, num_steps: int) -> None:
        """Let the run make so many steps more."""
        for _ in range(num_steps):
            self._write(is_last=False)

    def finish(self) -> int:
        """Let it make one more, its last; returns how many that are in all."""
        self._write(is_last=True)
        return self._num_steps

    def _write(self, *, is_last: bool) -> None:
        positions = range(self._num_steps * BATCH, (self._num_steps + 1) * BATCH)
        write_window(self.folder, self._processor, self._num_steps, positions, (), is_last=is_last, seed=0)
        self._num_steps += 1


def run_config(model: Path, samples: Samples, runs: Path, name: str, **changes: object) -> TrainConfig:
    stages = (StageConfig(name="all", trainable="valley-stage2", learning_rate=1e-3, epochs=1),)
    values = {"stages": stages, "cpus_per_worker": 1, "global_batch_size": BATCH, "timeout_s": 300.0}
    return make_config(model, samples.folder, runs, name, **values | changes)


def begin(pool: ThreadPoolExecutor, config: TrainConfig, samples: Samples) -> Future[dict[str, Any]]:
    """As `train` does beside a pipeline: windows are still to come."""
    return pool.submit(fit.fit, config, run_folder(config.storage, str(config.run_name)), samples.folder)


def until(is_so: Callable[[], bool], run: Future[dict[str, Any]]) -> None:
    """Return once it is so."""
    deadline_s = time.monotonic() + 300
    while not is_so():
        assert not run.done(), f"the run has ended: {run.result()}"
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def made(folder: Path, step: int) -> Callable[[], bool]:
    """Whether `step` is logged."""
    return lambda: bool(lines := read_metrics(folder / "metrics.jsonl")) and lines[-1].step >= step


def works_with(folder: Path, workers: int) -> Callable[[], bool]:
    """Whether the newest attempt has so many workers."""
    return lambda: attempts(folder)[-1]["workers"] == workers


def test_a_run_follows_nodes_that_go_and_come(
    cluster: Cluster, tiny_valley: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "RESIZE_INTERVAL_S", 3.0)
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    samples, folder = Samples(tmp_path / "store", tiny_valley), tmp_path / "elastic"
    config = run_config(tiny_valley, samples, tmp_path, "elastic", checkpoint_every=EVERY, num_workers=(1, 2))
    samples.commit(15)
    with ThreadPoolExecutor(1) as pool:
        run = begin(pool, config, samples)
        try:
            until(made(folder, 10), run)
            cluster.remove_node(second, allow_graceful=False)
            until(works_with(folder, 1), run)
            samples.commit(15)
            until(made(folder, 20), run)
            cluster.add_node(num_cpus=1)
            until(works_with(folder, 2), run)
        finally:
            num_steps = samples.finish()
        run.result()
    begun = attempts(folder)
    print(f"elastic: {[(one['after_step'], one['workers']) for one in begun]}")
    fixed = train(config.model_copy(update={"num_workers": 1, "run_name": "fixed", "checkpoint_every": None}))
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line.step for line in lines] == list(range(1, num_steps + 1)), "no step is lost or told twice"
    assert losses(lines) == pytest.approx(losses(read_metrics(fixed.metrics_path)), abs=EXACT, rel=0)


def test_a_node_that_is_taken_away_with_notice_costs_no_step(
    cluster: Cluster, tiny_valley: Path, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    samples, folder = Samples(tmp_path / "store", tiny_valley), tmp_path / "drained"
    config = run_config(tiny_valley, samples, tmp_path, "drained", num_workers=1, max_failures=0)
    samples.commit(5)
    with ThreadPoolExecutor(1) as pool:
        run = begin(pool, config, samples)
        try:
            until(made(folder, 2), run)
            drain(cluster, busy_node())
            while len(attempts(folder)) == 1:
                # A notice is looked for after a step: steps go on until it is found.
                samples.commit(1)
                time.sleep(0.2)
                assert not run.done(), f"the run has ended: {run.result()}"
        finally:
            num_steps = samples.finish()
        run.result()
    first, second = attempts(folder)
    print(f"drained: the second attempt began after step {second['after_step']} of {num_steps}")
    assert first["after_step"] == 0
    assert second["after_step"] >= 2, "without any regular checkpoint"
    assert [line.step for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, num_steps + 1))


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
