"""Servers in processes of their own: started, asked for numbers, and ended when whoever started them lets go."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from valley_ray.benchmarks.process_cost import process_tree
from valley_ray.errors import UnavailableError

_END_TIMEOUT_S = 60.0


class Starter:
    """Whoever started this process, seen from here. What is printed from now on goes to stderr."""

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def tell(self, line: str) -> None:
        """The first line is the server's URL."""
        self._lines.write(f"{line}\n")
        self._lines.flush()

    def wait(self, numbers: Callable[[], Any] = dict) -> None:
        """Until the starter lets go; whenever it asks meanwhile, tell it the `numbers`."""
        for _ in sys.stdin:
            self.tell(json.dumps(numbers()))


class Child:
    """`python -m MODULE ARGUMENT` as a server; a context manager.

    Args:
        module: tells its Starter a URL once it answers there, then waits.
        argument: its only one.
        log: file for what it says on stderr.
        num_threads: of torch, in it and in whatever it starts.
    """

    def __init__(self, module: str, argument: str, *, log: Path, num_threads: int) -> None:
        self._module, self._argument, self._log = module, argument, log
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the benchmark alone, which then ends its children in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, self._argument],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self.url = self._read_line()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def numbers(self) -> Any:
        """What the child waits to be asked for."""
        assert self._process.stdin is not None, "it was started with pipes"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._read_line())

    def cpu_s(self) -> float:
        """CPU seconds of the child and all that it has started, until now."""
        return sum(one.cpu_s for one in process_tree(self._process.pid))

    def _read_line(self) -> str:
        assert self._process.stdout is not None, "it was started with pipes"
        line = self._process.stdout.readline().strip()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()
            reason = said[-1] if said else "it said nothing"
            raise UnavailableError(f"{self._module} ended: {reason} (all of it: {self._log})")
        return line

    def _end(self) -> None:
        assert self._process.stdin is not None, "it was started with pipes"
        self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
