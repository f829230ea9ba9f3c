"""Processes that live through a thousand videos do not grow with them; one large video costs its child little."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import write_clip
from fault_set import environment, num_shards

from valley_ray.benchmarks.decode_cost import child_peak_mb
from valley_ray.benchmarks.long_clips import write_long_clip
from valley_ray.benchmarks.process_cost import process_tree

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow]

NUM_VIDEOS = 1000
NUM_DISCARDED = 200
"""Videos until caches, arenas and lazy imports have come to rest."""
BLOCK_SIZE = 20
MB_PER_100_VIDEOS = 1.0

DRIVER = """
import sys
import ray
from valley_ray.data.config import PrepareConfig
from valley_ray.data.prepare import prepare
from valley_ray.session import quiet_ray_data

if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    quiet_ray_data()
    summary = prepare(PrepareConfig(sources=({"path": sys.argv[1]},), output=sys.argv[2], block_size=int(sys.argv[3])))
    assert summary.ok == summary.rows_in, summary
"""
"""One CPU: one worker and one decoding child see every video."""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder of its own for Ray, with a name short enough for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1200)
def test_driver_worker_and_decoding_child_stay_as_large_as_they_are(tmp_path: Path, temporary: Path) -> None:
    videos, output, log = tmp_path / "videos", tmp_path / "out", tmp_path / "driver.log"
    videos.mkdir()
    for seed in range(NUM_VIDEOS):
        write_clip(videos / f"{seed:04d}.mp4", seed=seed, side=48 + 16 * (seed % 5), num_frames=10 + seed % 7)
    env = environment(temporary)
    env.pop("RAY_ADDRESS", None)
    sizes: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    with log.open("wb") as file:
        command = [sys.executable, "-c", DRIVER, str(videos), str(output), str(BLOCK_SIZE)]
        driver = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    try:
        while driver.poll() is None:
            num_done = BLOCK_SIZE * num_shards(output)
            for one in process_tree(driver.pid):
                sizes[one.pid, one.kind].append((num_done, one.rss_bytes))
            time.sleep(0.1)
    finally:
        driver.kill()
    assert driver.returncode == 0, log.read_text()
    last = NUM_VIDEOS - 5 * BLOCK_SIZE  # later blocks are smaller, and then comes the report
    slopes: dict[str, list[float]] = defaultdict(list)
    for (pid, kind), points in sizes.items():
        counted = np.array([point for point in points if NUM_DISCARDED <= point[0] <= last])
        if len(counted) and np.ptp(counted[:, 0]) >= 0.9 * (last - NUM_DISCARDED):
            slopes[kind].append(np.polyfit(counted[:, 0], counted[:, 1], 1)[0] * 100 / 1e6)
            print(f"{kind} {pid}: {slopes[kind][-1]:+.3f} MB per 100 videos, {counted[-1, 1] / 1e6:.0f} MB")
    for kind in ("driver", "worker", "decoder"):
        assert slopes[kind], f"a {kind} should have lived through the run"
        assert max(slopes[kind]) < MB_PER_100_VIDEOS, f"a {kind} grows: {slopes}"


def test_child_holds_little_more_than_one_large_frame_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in (0, 3)]
    for number, path in zip((0, 3), paths, strict=True):
        write_long_clip(path, seed=number, num_bframes=number, seconds=12)
    peak_mb = child_peak_mb(paths)
    print(f"decoding child at most {peak_mb} MB")
    assert peak_mb is None or peak_mb <= 350
