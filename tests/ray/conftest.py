"""One Ray cluster for modules that follow each other and ask for the same: starting and ending one costs seconds."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def data_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two CPUs, whose metrics are reported twice a second; left running for a next module that uses it."""
    if not ray.is_initialized():
        often = {"metrics_report_interval_ms": 500}
        ray.init(address="local", num_cpus=2, include_dashboard=False, _system_config=often)
    yield
    items = request.session.items
    last = max(number for number, item in enumerate(items) if item.path == request.path)
    if not any("data_cluster" in getattr(item, "fixturenames", ()) for item in items[last + 1 : last + 2]):
        ray.shutdown()
