"""A server with a Ray of its own, as `valley-ray serve` runs it: ServeConfig → an application until told to end.

Joins another Ray only where RAY_ADDRESS names it. Knows no command line.
"""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from valley_ray.errors import ConfigError
from valley_ray.serve.app import ServedApp, build, free_port, run
from valley_ray.serve.config import HttpOptions, ServeConfig

_CONNECT_TIMEOUT_S = 5.0


@contextmanager
def run_standalone(config: ServeConfig, http: HttpOptions) -> Iterator[ServedApp]:
    """Start Ray, serve `config` until the block ends, stop Ray. SIGTERM ends the block as Ctrl-C does.

    What Serve and the replicas log goes to Ray's log folder alone (`/tmp/ray/session_latest/logs/serve`).

    Raises PortInUseError or ConfigError, before Ray is started where that can be seen; UnavailableError where a
    deployment does not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    build(config)
    port = free_port(http.host, http.port)
    _connect()
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with run(config, host=http.host, port=port) as served:
            yield served
    finally:
        ray.shutdown()


def _connect() -> None:
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        # ERROR: every new cluster warns that it has a token, which nobody needs for a server that ends with it.
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(address, error) from error


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
    return ConfigError(
        f"RAY_ADDRESS={address!r} cannot be joined ({reason}); export RAY_AUTH_MODE=token if it wants a token, or "
        "unset RAY_ADDRESS to start a Ray of its own"
    )
