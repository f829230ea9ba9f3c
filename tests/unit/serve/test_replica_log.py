"""What a replica's log says of a refused request, and of a fault."""

import logging

import pytest

from valley_ray.errors import MediaError, UnavailableError
from valley_ray.serve.replica_log import say_refusals_in_a_line


@pytest.mark.parametrize(
    ("error", "level", "said"),
    [
        (MediaError("a.mp4: no\nvideo"), "INFO", "refused: a.mp4: no video"),
        (UnavailableError("gone"), "ERROR", "Request failed."),
        (KeyError("a fault"), "ERROR", "Request failed."),
    ],
    ids=["refused", "not the client's", "fault"],
)
def test_a_refusal_is_one_line_and_a_fault_keeps_its_traceback(
    error: Exception, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "filters", [])
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    for _ in range(2):
        say_refusals_in_a_line()
    assert len(logger.filters) == 1
    try:
        raise error
    except Exception:
        logger.exception("Request failed.")
    [record] = records
    assert (record.levelname, record.getMessage()) == (level, said)
    assert (record.exc_info is None) == (level == "INFO")
