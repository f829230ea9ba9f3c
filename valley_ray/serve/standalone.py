"""A server with a Ray of its own, as `valley-ray serve` runs it: ServeConfig → an application until told to end.

Joins another Ray only where RAY_ADDRESS names it. Knows no command line.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from valley_ray.serve.app import ServedApp, build, free_port, run
from valley_ray.serve.capacity import check_capacity
from valley_ray.serve.config import HttpOptions, ServeConfig
from valley_ray.serve.keys import check_exposure, read_keys
from valley_ray.session import connect


@contextmanager
def run_standalone(
    config: ServeConfig, http: HttpOptions, *, on_start: Callable[[], None] = lambda: None
) -> Iterator[ServedApp]:
    """Start Ray, serve `config` until the block ends, stop Ray. SIGTERM ends the block as Ctrl-C does.

    What Serve and the replicas log goes to Ray's log folder alone (`/tmp/ray/session_latest/logs/serve`). `on_start` is
    called where nothing was found wrong, Ray runs and the model is about to be opened.

    Raises PortInUseError or ConfigError, before Ray is started where that can be seen (whether this machine has what
    the replicas reserve is seen by its Ray); UnavailableError where a deployment does not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    build(config)
    check_exposure(http.host, read_keys(config.api_keys_file), allow_no_keys=config.allow_no_keys)
    port = free_port(http.host, http.port)
    # ERROR: every new cluster warns that it has a token, which nobody needs for a server that ends with it.
    connect(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if os.environ.get("RAY_ADDRESS", "") in ("", "local"):  # a cluster that is joined may grow
            [node] = ray.nodes()
            check_capacity(config, resources=node["Resources"], labels=node["Labels"])
        on_start()
        with run(config, host=http.host, port=port) as served:
            yield served
    finally:
        ray.shutdown()
