"""Fixtures for every room."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_valley(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a tiny random Valley (tests/tiny.py)."""
    from tiny import make_tiny_valley

    return make_tiny_valley(tmp_path_factory.mktemp("tiny-valley"))
