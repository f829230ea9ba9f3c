"""Connecting a process to Ray: to the cluster that RAY_ADDRESS names, else to one of its own, never by chance."""

import logging
import os
import socket
from typing import Any

from valley_ray.errors import ConfigError

_CONNECT_TIMEOUT_S = 5.0


def connect(*, include_dashboard: bool = True, **options: Any) -> None:
    """Connect this process to Ray; `options` go to `ray.init`. Does nothing where it is connected already.

    A bare `ray.init()` would join whatever Ray runs on the machine; a process must be pointed at a cluster instead, as
    `ray job submit` does through RAY_ADDRESS. `include_dashboard` counts for a cluster of our own. Ray Train needs it:
    its state API answers what became of a run.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        ray.init(address="local", include_dashboard=include_dashboard, **options)
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
