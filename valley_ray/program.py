"""How a program of this project ends: an exit status and, where that is not 0, one line on stderr."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from valley_ray.errors import ValleyError

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM as an exception: what was begun is cleaned up."""


def run_program(name: str, work: Callable[[], None], *, stopped: str = "stopped; run it again to go on") -> int:
    """Exit status of `work`: 0, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM, which ends it as Ctrl-C does.

    Args:
        name: how the line on stderr begins.
        stopped: what that line says after Ctrl-C or SIGTERM, where the KeyboardInterrupt itself says nothing.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        work()
    except ValleyError as error:
        return _end(name, f"error: {error}", USER_ERROR)
    except KeyboardInterrupt as error:
        is_terminated = isinstance(error, _Terminated) or signal.SIGTERM.name in str(error)
        return _end(name, str(error) or stopped, TERMINATED if is_terminated else INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break off the cleaning
    raise _Terminated


def _end(name: str, line: str, status: int) -> int:
    print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
    return status
