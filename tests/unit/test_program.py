"""The endings of a program: exit status, and one line on stderr."""

import signal
from collections.abc import Callable
from typing import NoReturn

import pytest

from valley_ray.errors import ConfigError
from valley_ray.program import run_program


def fail(error: BaseException) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "status", "line"),
    [
        (fail(ConfigError("two\nlines")), 2, "job: error: two lines\n"),
        (fail(KeyboardInterrupt()), 130, "job: stopped; run it again to go on\n"),
        (fail(KeyboardInterrupt("ended by Ctrl-C; go on")), 130, "job: ended by Ctrl-C; go on\n"),
        (fail(KeyboardInterrupt("ended by SIGTERM; go on")), 143, "job: ended by SIGTERM; go on\n"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "job: stopped; run it again to go on\n"),
        (lambda: None, 0, ""),
    ],
    ids=["mistake", "ctrl-c", "ctrl-c-with-words", "sigterm-with-words", "sigterm", "end"],
)
def test_every_ending_has_a_status_and_one_line(
    work: Callable[[], None], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_program("job", work) == status
    assert capsys.readouterr().err == line
    assert signal.getsignal(signal.SIGTERM) == before
