"""Two Ray nodes on this machine that ask for a token, and jobs submitted to them as users do."""

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STARTED_S = 120
JOB_S = 900


@dataclass(frozen=True)
class Nodes:
    """Two nodes on this machine, with the environment in which a client speaks to them."""

    dashboard: str
    environment: dict[str, str]


@contextlib.contextmanager
def start_two_nodes(folder: Path) -> Iterator[Nodes]:
    """`ray start --head` and a second node, of one CPU each, ended by their process ids; logs go to `folder`."""
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
    port, dashboard = _free_port(), _free_port()
    head = [f"--port={port}", "--head", f"--dashboard-port={dashboard}"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, words in (
            ("head", [*head, f"--ray-client-server-port={_free_port()}"]),
            ("second", [f"--address=127.0.0.1:{port}"]),
        ):
            log = (folder / f"{name}.log").open("wb")
            command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
            # Nodes that share one would unpack the working directory over each other, under the running job.
            command += [f"--temp-dir={temporary / name}", f"--dashboard-agent-listen-port={_free_port()}", *words]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            _wait_for_text(folder / f"{name}.log", "Ray runtime started", started[-1])
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


def submit(nodes: Nodes, job: str, words: Sequence[str], *, storage: Path) -> str:
    """`ray job submit --working-dir . -- python jobs/JOB.py WORDS`; what it printed, once it has ended well."""
    runtime = {"env_vars": {"VALLEY_STORAGE": str(storage), "OMP_NUM_THREADS": "1"}}
    command = [str(BIN / "ray"), "job", "submit", f"--address={nodes.dashboard}", "--working-dir=."]
    command += [f"--runtime-env-json={json.dumps(runtime)}", "--", "python", f"jobs/{job}.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=nodes.environment, capture_output=True, text=True, timeout=JOB_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for_text(log: Path, text: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + STARTED_S
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)
