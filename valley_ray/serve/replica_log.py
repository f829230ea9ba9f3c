"""What replicas log of a request that they refuse: one line, where Serve writes a traceback for every error."""

import logging

from valley_ray.errors import ValleyError


def say_refusals_in_a_line() -> None:
    """For this process; called where a deployment is made."""
    logger = logging.getLogger("ray.serve")
    if _one_line not in logger.filters:
        logger.addFilter(_one_line)


def _one_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ValleyError) and error.http_status < 500:
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = "refused: %s", (" ".join(str(error).split()),)
        record.exc_info = None
    return True
