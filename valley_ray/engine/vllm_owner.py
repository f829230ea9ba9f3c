"""Ends vLLM's processes with the process that started them, however that ended.

vLLM's engine process outlives a parent that was killed, and with it the memory of its GPU. Runs in the process that
computes: the engine process itself or a child of it.
"""

import os
import select
import signal
import threading

_OWNER = "VALLEY_VLLM_OWNER"


def own() -> None:
    """Call before vLLM starts: its processes belong to this one."""
    os.environ[_OWNER] = str(os.getpid())


def end_with_owner() -> None:
    """Call in vLLM's process: watch the owner from a thread. Does nothing where nobody called `own`."""
    owner, parent = int(os.environ.get(_OWNER, "0")), os.getppid()
    if not owner:
        return
    threading.Thread(target=_watch, args=(owner, parent), name="owner", daemon=True).start()


def _watch(owner: int, parent: int) -> None:
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:
        pass  # it has ended already
    else:
        select.select([handle], [], [])
    # A parent that is not the owner is the engine process, which waits for this one.
    if os.getppid() == parent and parent != owner:
        os.kill(parent, signal.SIGKILL)
    os._exit(1)
