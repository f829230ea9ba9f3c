"""Fixtures for every room, and which tests may run beside each other (`pytest -n 2`)."""

from pathlib import Path
from typing import Any

import pytest

_WITH_CLUSTERS = ("ray", "faults")
"""Folders whose tests start clusters; one at a time is what two cores can take."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests, which share fixtures, stay in one process; all that start clusters do so together."""
    from xdist.scheduler import LoadFileScheduling

    class OneClusterAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            is_with_clusters = nodeid.split("/")[1] in _WITH_CLUSTERS
            return "clusters" if is_with_clusters else super()._split_scope(nodeid)

    return OneClusterAtATime(config, log)


@pytest.fixture(scope="session")
def tiny_valley(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a tiny random Valley (tests/tiny.py)."""
    from tiny import make_tiny_valley

    return make_tiny_valley(tmp_path_factory.mktemp("tiny-valley"))
