"""jobs/prepare.py over bad files, with its driver and a node killed on the way: every row is accounted for."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_set import (
    check,
    environment,
    kill_driver,
    kill_node,
    make_fault_set,
    num_finished,
    num_shards,
    start_driver,
    wait_for,
    wait_until_quiet,
)
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.faults]

NUM_ROWS = int(os.environ.get("VALLEY_FAULT_ROWS", "10000"))


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder of its own for Ray, with a name short enough for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_500_rows_survive_a_killed_driver(tmp_path: Path, temporary: Path) -> None:
    faults = make_fault_set(tmp_path / "set", 500, num_crashing=4, num_hanging=2)
    output, log = tmp_path / "out", tmp_path / "driver.log"
    env = environment(temporary)
    env.pop("RAY_ADDRESS", None)
    first = start_driver(faults, output, env, log)
    wait_for(lambda: num_finished(output) >= 150 or first.poll() is not None, "a third of the work")
    assert first.poll() is None, f"the driver ended by itself:\n{log.read_text()}"
    kill_driver(first)
    finished, under_way = num_finished(output), len(list((output / "shards").glob(".*.journal")))
    assert finished < 500, "it was killed in the middle"
    num_workers = os.cpu_count() or 1
    assert under_way <= num_workers, "what is lost is at most a block per worker"
    second = start_driver(faults, output, env, log)
    assert second.wait(timeout=240) == 0, log.read_text()
    summary = check(faults, output)
    assert summary["clips_decoded"] == 500 - finished, "finished blocks are not decoded again"


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_next_run_goes_on(tmp_path: Path, temporary: Path) -> None:
    faults = make_fault_set(tmp_path / "set", 400, num_crashing=0, num_hanging=0)
    output, log = tmp_path / "out", tmp_path / "driver.log"
    env = environment(temporary)
    env.pop("RAY_ADDRESS", None)
    first = start_driver(faults, output, env, log)
    wait_for(lambda: num_shards(output) >= 2 or first.poll() is not None, "two blocks")
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to all of its group
    assert first.wait(timeout=60) == 130
    assert log.read_text().splitlines()[-1] == "prepare: stopped; run it again to go on"
    assert "Traceback" not in log.read_text()
    finished = num_finished(output)
    assert 0 < finished < 400, "it was stopped in the middle"
    second = start_driver(faults, output, env, log)
    assert second.wait(timeout=240) == 0, log.read_text()
    assert check(faults, output)["clips_decoded"] == 400 - finished


@pytest.fixture
def cluster(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes of two CPUs on this machine; the second one may be killed."""
    for name, value in environment(temporary, RAY_task_oom_retries="16").items():
        monkeypatch.setenv(name, value)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_killed_node_and_a_killed_driver_lose_and_repeat_nothing(
    tmp_path: Path, temporary: Path, cluster: Cluster
) -> None:
    """VALLEY_FAULT_ROWS sets the number of rows: 10,000 by default."""
    share = NUM_ROWS // 500
    faults = make_fault_set(tmp_path / "set", NUM_ROWS, num_crashing=2 * share, num_hanging=share)
    output, log = tmp_path / "out", tmp_path / "driver.log"
    env = environment(temporary, RAY_ADDRESS=cluster.address)
    first = start_driver(faults, output, env, log)
    wait_for(lambda: num_shards(output) >= NUM_ROWS // 16 // 4 or first.poll() is not None, "a quarter", timeout_s=900)
    assert first.poll() is None, f"the driver ended by itself:\n{log.read_text()}"
    kill_node(cluster.worker_nodes.pop())
    there = num_shards(output)
    wait_for(
        lambda: num_shards(output) >= there + NUM_ROWS // 16 // 4 or first.poll() is not None, "half", timeout_s=900
    )
    assert first.poll() is None, f"the driver did not survive a node:\n{log.read_text()}"
    kill_driver(first)
    cluster.add_node(num_cpus=2)
    wait_until_quiet(output)
    finished = num_finished(output)
    assert finished < NUM_ROWS, "it was killed in the middle"
    second = start_driver(faults, output, env, log)
    assert second.wait(timeout=1800) == 0, log.read_text()
    summary = check(faults, output)
    print(f"\n{NUM_ROWS} rows, {finished} of them before the driver was killed: {summary}")
    assert summary["clips_decoded"] == NUM_ROWS - finished, "finished blocks are not decoded again"
