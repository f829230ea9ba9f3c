"""`valley-ray serve` as a process of its own: it answers, prints a curl line that works, and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from clips import write_clip

from valley_ray.assistant import Assistant

pytestmark = pytest.mark.ray


def descendants(pid: int) -> set[int]:
    """Processes below `pid`, by the parents that the kernel names."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, added = {pid}, {pid}
    while added:
        added = {child for child, parent in parents.items() if parent in added} - found
        found |= added
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are looked up in /proc")
def test_serve_answers_until_interrupted(tiny_valley: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    config = tmp_path / "valley.yaml"
    config.write_text(
        "http_options: {host: 127.0.0.1, port: 0}\n"
        "applications:\n"
        f"- {{import_path: 'valley_ray.serve.app:build', args: {{model: {tiny_valley}}}}}\n"
    )
    command = [sys.executable, "-m", "valley_ray.cli", "serve", str(config), f"allow_roots=[{tmp_path}]"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith(f"valley-ray: {tiny_valley.name} answers at http://127.0.0.1:"), (
            process.stderr.read()
        )
        curl = lines[2].replace("FILE.mp4", clip.name)
        url, body = curl.split()[1], json.loads(curl.partition(" -d '")[2].removesuffix("'\n"))
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.load(reply)["choices"][0]["message"]["content"]
        family = descendants(process.pid)
        assert len(family) > 5
        process.send_signal(signal.SIGINT)
        started, stopped = process.stderr.read().splitlines()
        assert started.startswith(f"valley-ray: {tiny_valley} is being opened")
        assert stopped == "valley-ray: stopped"
        assert process.wait(timeout=60) == 0
    assert [pid for pid in family if is_running(pid)] == []
    with Assistant.from_pretrained(tiny_valley) as assistant:
        assert assistant.ask("What is moving?", video=clip).text == answer


@pytest.mark.slow
def test_a_model_that_no_replica_can_open_is_one_line(tiny_valley: Path, tmp_path: Path) -> None:
    """Slow because Serve starts a failing replica three times."""
    broken = shutil.copytree(tiny_valley, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    command = [sys.executable, "-m", "valley_ray.cli", "serve", f"model={broken}", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert shown.returncode == 2
    [line] = [line for line in shown.stderr.splitlines() if line.startswith("valley-ray: error: ")]
    assert f"the server did not come up: {broken}: a weight file is damaged" in line
    assert "Traceback" not in shown.stdout + shown.stderr
