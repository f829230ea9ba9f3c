"""jobs/answer.py with an actor and its driver killed on the way: every row answered once, none lost."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from asked import record, settings
from clips import write_clip
from fault_set import environment, kill_driver, wait_for

from valley_ray.evaluate.answers import answer

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NUM_CLIPS, NUM_QUESTIONS = 24, 20
RUN_S = 400
"""Longest run of a driver; on two idle cores it takes a fraction."""
BAD = {"empty.mp4": (b"", "media_empty"), "text.mp4": (b"<html>no video</html>", "media_not_recognised")}
"""Files that fail, beside one that is not there."""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder of its own for Ray, with a name short enough for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="va-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def make_set(folder: Path) -> Path:
    """Questions about good and bad clips, mixed; returns the file of records."""
    folder.mkdir()
    names = [write_clip(folder / f"{seed}.mp4", seed=seed).name for seed in range(NUM_CLIPS)]
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    names += [*BAD, "missing.mp4"]
    values = [
        record(f"{name}-{number}", name, f"Which colour has shape {number}?")
        for number in range(NUM_QUESTIONS)
        for name in names
    ]
    path = folder / "records.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def start_driver(model: Path, records: Path, output: Path, env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """`python jobs/answer.py` over the set, two actors."""
    command = [sys.executable, str(ROOT / "jobs" / "answer.py"), "--input", str(records), "--output", str(output)]
    words = [f"model={model}", "max_tokens=12", "block_size=8", "num_slots=2", "num_actors=2", "actor_cpus=0.5"]
    with log.open("ab") as file:
        return subprocess.Popen([*command, *words], env=env, stdout=file, stderr=file, start_new_session=True)


def ledger_keys(output: Path) -> list[str]:
    """Key of every whole line of the ledger."""
    paths = (output / "answers").glob("*/*.jsonl")
    lines = [line for path in paths for line in path.read_bytes().split(b"\n")[:-1]]
    keys = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a death cut it short
            keys.append(json.loads(line)["key"])
    return keys


def actors_of(driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Processes of the pool that have loaded the model or are about to."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "AnswerStage" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.timeout(1200)
def test_a_killed_actor_and_a_killed_driver_lose_and_repeat_nothing(
    tiny_valley: Path, tmp_path: Path, temporary: Path
) -> None:
    records = make_set(tmp_path / "set")
    num_rows = (NUM_CLIPS + len(BAD) + 1) * NUM_QUESTIONS
    wanted = answer(settings(records, num_slots=16, block_size=64), tiny_valley, tmp_path / "here", on_ray=False)
    output, log = tmp_path / "out", tmp_path / "driver.log"
    # The real decoder: the one that crashes on marked files cannot tell that a file is not there.
    env = environment(temporary, PYTHONPATH=str(ROOT))
    env.pop("RAY_ADDRESS", None)

    def wait_for_answers(driver: "subprocess.Popen[bytes]", number: int) -> None:
        wait_for(
            lambda: len(ledger_keys(output)) >= number or driver.poll() is not None,
            f"{number} answers",
            timeout_s=RUN_S,
        )
        assert driver.poll() is None, f"the driver ended by itself:\n{log.read_text()}"

    first = start_driver(tiny_valley, records, output, env, log)
    wait_for_answers(first, num_rows // 6)
    victim = actors_of(first)[0]
    os.kill(victim.pid, signal.SIGKILL)
    wait_for_answers(first, len(ledger_keys(output)) + num_rows // 6)
    assert victim.pid not in {actor.pid for actor in actors_of(first)}
    kill_driver(first)
    before = ledger_keys(output)
    assert num_rows // 3 <= len(before) < num_rows, "it was killed in the middle"
    assert not (output / "answers.parquet").exists()

    second = start_driver(tiny_valley, records, output, env, log)
    assert second.wait(timeout=RUN_S) == 0, log.read_text()
    summary: dict[str, Any] = json.loads((output / "answers-summary.json").read_text(encoding="utf-8"))
    assert summary["rows_in"] == num_rows == summary["ok"] + summary["failed"]
    assert summary["repeated_rows"] == 0
    assert summary["asked"] == num_rows - len(before), "what was answered is not asked again"
    keys = ledger_keys(output)
    assert len(keys) == len(set(keys)) == num_rows, "no answer is made twice, none is lost"
    classes = {error_class: NUM_QUESTIONS for _, error_class in BAD.values()} | {"source_not_found": NUM_QUESTIONS}
    assert summary["by_error_class"] == classes
    table = pq.read_table(output / "answers.parquet")
    for ours, theirs in (("sample_id", "sample_id"), ("answer", "prediction"), ("error_class", "error_class")):
        assert table[ours].to_pylist() == wanted.table[theirs].to_pylist()
    lines = (output / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == table.to_pylist()
