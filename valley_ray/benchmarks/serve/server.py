"""Our server as a child process with a Ray of its own: python -m valley_ray.benchmarks.serve.server SERVE_CONFIG"""

import logging
import sys
from typing import Any

import ray
from ray import serve

from valley_ray.benchmarks.serve.child import Starter
from valley_ray.serve.app import APP_NAME, run
from valley_ray.serve.config import ServeConfig

NUM_CPUS = 2
_OBJECT_STORE_BYTES = 256 * 2**20


def start_ray() -> None:
    """A Ray on two CPUs for this process alone."""
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def main(config: str) -> None:
    """Serve until whoever started this process lets go of it."""
    starter = Starter()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    served = ServeConfig.model_validate_json(config)
    start_ray()
    try:
        with run(served, port=0) as app:
            starter.tell(app.url)
            starter.wait(_encoder_numbers if served.shape == "split" else dict)
    finally:
        ray.shutdown()


def _encoder_numbers() -> dict[str, int]:
    """Counts of the one encoder replica since it started."""
    numbers: dict[str, Any] = serve.get_deployment_handle("VisionEncoder", APP_NAME).stats.remote().result()
    return numbers


if __name__ == "__main__":
    main(sys.argv[1])
