"""Processes of vLLM end with the process that started them; shown with stand-ins, which cost nothing to start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMPUTING = """
import time
from valley_ray.engine.vllm_owner import end_with_owner
end_with_owner()
print("runs", flush=True)
time.sleep(600)
"""

ENGINE = f"""
import subprocess, sys, time
if sys.argv[1] == "computes":
    exec({COMPUTING!r})
child = subprocess.Popen([sys.executable, "-c", {COMPUTING!r}])
time.sleep(600)
"""

OWNER = f"""
import subprocess, sys, time
from valley_ray.engine.vllm_owner import own
own()
child = subprocess.Popen([sys.executable, "-c", {ENGINE!r}, sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_owner_takes_the_engine_and_its_worker_along() -> None:
    for shape in ("computes", "has a worker"):
        owner = subprocess.Popen([sys.executable, "-c", OWNER, shape], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        engine, started = int(owner.stdout.readline()), owner.stdout.readline()
        assert started == "runs\n"
        assert is_running(engine)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        deadline = time.monotonic() + 30
        while is_running(engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(engine), shape
        # Nobody is left who could write: the worker has ended too.
        assert owner.stdout.read() == ""
        owner.stdout.close()
