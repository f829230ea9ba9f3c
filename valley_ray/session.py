"""Connecting a process to Ray: to the cluster that RAY_ADDRESS names, else to one of its own, never by chance."""

import logging
import os
import signal
import socket
import threading
from typing import Any

from valley_ray.errors import ConfigError, UnavailableError

OOM_RETRIES_VARIABLE = "RAY_task_oom_retries"
OOM_RETRIES = 16
"""How often a task may be killed for the memory of its node and be begun again; Ray's own default is for ever."""

_CONNECT_TIMEOUT_S = 5.0


def connect(*, include_dashboard: bool = True, **options: Any) -> None:
    """Connect this process to Ray; `options` go to `ray.init`. Does nothing where it is connected already.

    A bare `ray.init()` would join whatever Ray runs on the machine; a process must be pointed at a cluster instead, as
    `ray job submit` does through RAY_ADDRESS. `include_dashboard` counts for a cluster of our own. Ray Train needs it:
    its state API answers what became of a run. A cluster of our own bounds the retries of tasks that are killed for
    memory; where one is joined, set RAY_task_oom_retries in the environment of its nodes and of the driver. A handler
    of SIGTERM that this process has set stays in its place.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
        UnavailableError: a cluster of our own does not start in the time that Ray gives it.
    """
    import ray

    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _init(include_dashboard=include_dashboard, **options)
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


def _init(*, include_dashboard: bool, **options: Any) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        if OOM_RETRIES_VARIABLE not in os.environ:
            # The environment would be too late: Ray has read it when it was imported.
            options["_system_config"] = {"task_oom_retries": OOM_RETRIES, **(options.get("_system_config") or {})}
        try:
            ray.init(address="local", include_dashboard=include_dashboard, **options)
        except Exception as error:  # Ray's own has no class of its own
            if "timed out during startup" in str(error):
                raise UnavailableError("Ray did not start in a minute, the machine is too busy; try again") from error
            raise
        return
    _check_reachable(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(address, error) from error


def quiet_ray_data() -> None:
    """Leave Ray Data's progress bars, but not its plans and progress in words."""
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of bars that are switched off on purpose.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"RAY_ADDRESS={address!r} cannot be joined ({reason}); unset it to start a Ray of its own")
