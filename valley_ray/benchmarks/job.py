"""A benchmark as a program: key=value arguments → settings → lines of progress and, last on stdout, one JSON object."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from valley_ray.config import Config, load_config
from valley_ray.errors import ValleyError
from valley_ray.program import INTERRUPTED, USER_ERROR

Say = Callable[[str], None]
"""Takes a line of progress."""

Settings = TypeVar("Settings", bound=Config)
Benchmark = tuple[type[Settings], Callable[[Settings, Say], Mapping[str, object]]]
"""What a user sets, and what measures: the latter raises AssertionError where the compared sides differ."""

UNEQUAL = 1


def run_job(
    name: str, usage: str | None, opened: Callable[[], Benchmark[Settings]], arguments: Sequence[str] | None = None
) -> int:
    """Exit status, with one line on stderr where it is not 0.

    2 for a user's mistake, 130 for Ctrl-C, 1 where the compared sides did not do the same work: then there are no
    numbers, whatever was timed.

    Args:
        opened: imports the benchmark, which takes seconds, on one thread of numpy and torch where OMP_NUM_THREADS does
            not say otherwise.
        arguments: None: those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print((usage or "").strip())
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is imported
    try:
        settings, measure = opened()
        numbers = measure(load_config(settings, overrides=arguments), _say)
    except ValleyError as error:
        return _end(name, f"error: {error}", USER_ERROR)
    except AssertionError as error:
        return _end(name, f"nothing to compare: {error}", UNEQUAL)
    except KeyboardInterrupt:
        return _end(name, "stopped", INTERRUPTED)
    print(json.dumps(numbers), flush=True)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _end(name: str, line: str, status: int) -> int:
    print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
    return status
