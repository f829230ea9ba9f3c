"""The training jobs as users run them: written out, and submitted to a cluster of two nodes with a token."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.nano.make import WorldConfig, make_clips
from valley_ray.train.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STARTED_S = 120

SMALL = (
    "global_batch_size=8",
    "micro_batch_size=4",
    "stages.0.max_steps=3",
    "log_every=1",
    "data.pipeline.window_size=16",
)
WORLD = WorldConfig(num_train=24, num_held_out=2, num_train_harder=0, num_held_out_harder=0)


def small_world(storage: Path, model: Path) -> None:
    """Clips and a model where the nano configurations look for theirs."""
    make_clips(storage / "runs" / "nano" / "data", WORLD, say=print)
    shutil.copytree(model, storage / "runs" / "nano" / "backbones")


def test_stage_2_goes_on_from_what_pretrain_leaves_over_the_same_clips(tmp_path: Path, tiny_valley: Path) -> None:
    small_world(tmp_path, tiny_valley)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)

    def run(name: str, *words: str) -> str:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *SMALL, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    assert "models/nano-pretrained" in run("pretrain", "run_name=first")
    second = "stages=[{name: two, trainable: valley-stage2, learning_rate: 1.0e-3, max_steps: 3}]"
    run("finetune", second, "model=models/nano-pretrained", "run_name=second")
    (first,) = (tmp_path / "runs" / "pretrain").glob("first/metrics.jsonl")
    assert [line.stage for line in read_metrics(first)] == ["stage1"] * 3
    model = ValleyForConditionalGeneration.from_pretrained(tmp_path / "models" / "nano-finetuned")
    before = ValleyForConditionalGeneration.from_pretrained(tmp_path / "models" / "nano-pretrained")
    assert not model.core.mm_projector.weight.equal(before.core.mm_projector.weight)
    assert model.core.language_model.lm_head.weight.equal(before.core.language_model.lm_head.weight)


@dataclass(frozen=True)
class Nodes:
    """Two nodes on this machine, with the environment in which a client speaks to them."""

    dashboard: str
    environment: dict[str, str]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Nodes]:
    """`ray start --head` and a second node, ended by their process ids."""
    temporary = Path(tempfile.mkdtemp(prefix="vt-", dir="/tmp"))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    port, dashboard = free_port(), free_port()
    head = [f"--port={port}", "--head", f"--dashboard-port={dashboard}"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, words in (
            ("head", [*head, f"--ray-client-server-port={free_port()}"]),
            ("second", [f"--address=127.0.0.1:{port}"]),
        ):
            log = (tmp_path / f"{name}.log").open("wb")
            command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
            # Nodes that share one would unpack the working directory over each other, under the running job.
            command += [f"--temp-dir={temporary / name}", f"--dashboard-agent-listen-port={free_port()}", *words]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            wait_for_text(tmp_path / f"{name}.log", "Ray runtime started", started[-1])
        yield Nodes(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        for process in reversed(started):
            begun = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            _, alive = psutil.wait_procs([psutil.Process(process.pid), *begun] if begun else [], timeout=30)
            for one in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_text(log: Path, text: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + STARTED_S
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)


def test_a_submitted_job_trains_on_two_nodes(two_nodes: Nodes, tmp_path: Path, tiny_valley: Path) -> None:
    """Two workers of 0.75 CPUs fit two nodes of one CPU each, and no one of them."""
    storage = tmp_path / "storage"
    small_world(storage, tiny_valley)
    runtime = {"env_vars": {"VALLEY_STORAGE": str(storage), "OMP_NUM_THREADS": "1"}}
    command = [str(BIN / "ray"), "job", "submit", f"--address={two_nodes.dashboard}", "--working-dir=."]
    command += [f"--runtime-env-json={json.dumps(runtime)}", "--", "python", "jobs/finetune.py", *SMALL]
    command += ["stages.1.max_steps=3", "cpus_per_worker=0.75", "data.pipeline.decode_cpus=0.25", "run_name=two"]
    done = subprocess.run(command, cwd=ROOT, env=two_nodes.environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"storage: {storage}" in done.stdout
    lines = read_metrics(storage / "runs" / "finetune" / "two" / "metrics.jsonl")
    assert [line.stage for line in lines] == ["stage1"] * 3 + ["stage2"] * 3
    ValleyForConditionalGeneration.from_pretrained(storage / "models" / "nano-finetuned")
