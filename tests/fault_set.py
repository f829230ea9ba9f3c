"""Many small clips, some of them bad in every way, and what has to come of each; a driver that can be killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from data_clips import write_clip
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from valley_ray.data.frame_store import FrameStore, read_shard_records
from valley_ray.data.prepare import read_tables
from valley_ray.data.schema import CLIPS_SCHEMA, OK

ROOT = Path(__file__).parents[1]
NUM_CONTENTS = 50
TIMEOUT_S = 2.0
"""Of one attempt to decode a clip; a hanging one costs two of them."""

BAD_CLASSES = ("media_empty", "media_not_recognised", "media_truncated")


@dataclass(frozen=True)
class FaultSet:
    """A folder of clips; `wanted` has the class of failure by file name, "" and a brightness where there is none."""

    folder: Path
    wanted: dict[str, tuple[str, int]]
    num_contents: int

    @property
    def by_error_class(self) -> dict[str, int]:
        """How many have to fail, and why."""
        return dict(Counter(error_class for error_class, _ in self.wanted.values() if error_class))


def make_fault_set(folder: Path, num_rows: int, *, num_crashing: int, num_hanging: int) -> FaultSet:
    """`num_rows` files of NUM_CONTENTS contents under distinct names; 3 % of them are no whole video."""
    pool = folder / "pool"
    pool.mkdir(parents=True)
    good = [write_clip(pool / f"{index}.mp4", brightness=4 * index) for index in range(NUM_CONTENTS)]
    whole = good[0].read_bytes()
    for index, content in enumerate((b"", b"<html>not a video</html>", whole[: len(whole) // 2])):
        (pool / f"bad-{index}").write_bytes(content)
    for name in ("CRASH", "HANG"):
        (pool / name).write_bytes(name.encode() + b" the decoding child")
    special = {(37 * index + 11) % num_rows: "CRASH" for index in range(num_crashing)}
    special |= {(53 * index + 23) % num_rows: "HANG" for index in range(num_hanging)}
    special |= {row: f"bad-{row // 33 % len(BAD_CLASSES)}" for row in range(5, num_rows, 33) if row not in special}
    wanted = {}
    (folder / "clips").mkdir()
    for row in range(num_rows):
        name = f"{row:06d}.mp4"
        content = special.get(row)
        os.link(pool / content if content else good[row % NUM_CONTENTS], folder / "clips" / name)
        wanted[name] = (_class_of(content), 4 * (row % NUM_CONTENTS)) if content else ("", 4 * (row % NUM_CONTENTS))
    return FaultSet(folder / "clips", wanted, NUM_CONTENTS + len(set(special.values())))


def _class_of(content: str) -> str:
    if content.startswith("bad-"):
        return BAD_CLASSES[int(content.removeprefix("bad-"))]
    return "decode_crash" if content == "CRASH" else "decode_timeout"


def environment(temporary: Path, **more: str) -> dict[str, str]:
    """For a driver or a cluster whose decoding children crash and hang on the marked files."""
    path = os.pathsep.join((str(ROOT / "tests" / "faults" / "decoder"), str(ROOT)))
    own = {"PYTHONPATH": path, "RAY_TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return {**os.environ, **own, **more}


def start_driver(faults: FaultSet, output: Path, env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """`python jobs/prepare.py` over the set."""
    settings = [
        "block_size=16",
        "sampling.num_frames=2",
        "video_crop={size: 32, short_side: 32}",
        f"sandbox.timeout_s={TIMEOUT_S}",
    ]
    command = [
        sys.executable,
        str(ROOT / "jobs" / "prepare.py"),
        "--input",
        str(faults.folder),
        "--output",
        str(output),
    ]
    with log.open("ab") as file:
        return subprocess.Popen([*command, *settings], env=env, stdout=file, stderr=file, start_new_session=True)


def num_shards(output: Path) -> int:
    """Whole shards."""
    return len(list((output / "shards").glob("shard-*.arrow")))


def num_finished(output: Path) -> int:
    """Rows of whole shards."""
    return sum(len(read_shard_records(path)[1]) for path in (output / "shards").glob("shard-*.arrow"))


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 240) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.05)


def kill_driver(driver: "subprocess.Popen[bytes]") -> None:
    """SIGKILL, then wait until those that decode have ended by themselves; Ray's agents are ended here, by their id."""
    started = psutil.Process(driver.pid).children(recursive=True)
    agents = [process for process in started if "Agent" in process.name()]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs([process for process in started if process not in agents], timeout=60)
    for agent in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.kill()
    assert not alive, f"{alive} outlived their driver by a minute"


def kill_node(node: Any) -> None:
    """SIGKILL to one node of a `ray.cluster_utils.Cluster`: its raylet, then all that had started, as a power cut."""
    raylet = psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)
    for process in (raylet, *raylet.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.kill_all_processes(check_alive=False)


def wait_until_quiet(output: Path) -> None:
    """Tasks of a driver that is gone are ended by the cluster; wait for what they still finish."""
    wait_for(lambda: (before := num_shards(output)) == (time.sleep(5), num_shards(output))[1] and before > 0, "quiet")


def check(faults: FaultSet, output: Path) -> dict[str, Any]:
    """Every row is accounted for, with its reason or its own frames; returns the summary."""
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    num_rows = len(faults.wanted)
    assert summary["rows_in"] == num_rows == summary["ok"] + summary["failed"]
    assert summary["repeated_rows"] == 0
    assert summary["by_error_class"] == faults.by_error_class
    assert summary["duplicates"] == num_rows - faults.num_contents
    rows: pa.Table = read_tables(output / "clips", CLIPS_SCHEMA)
    store = FrameStore(output / "shards")
    came = {}
    for row in rows.to_pylist():
        brightness = None
        if row["status"] == OK:
            brightness = round(float(store.frames(row["shard"], row["row"])[0].mean()) / 4) * 4
        came[Path(row["uri"]).name] = (row["error_class"], brightness)
        assert row["attempts"] <= 2
    wanted = {name: (why, None if why else brightness) for name, (why, brightness) in faults.wanted.items()}
    assert came == wanted, "a neighbour of a bad file lost its frames or got another's"
    return summary
