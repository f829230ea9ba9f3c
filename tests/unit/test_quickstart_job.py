"""jobs/quickstart.py: how it ends when it is told to."""

import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_job", ROOT / "jobs" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(job: ModuleType) -> int:
    """The status with which the process ends."""
    try:
        return int(job.main())
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: signal.raise_signal(signal.SIGTERM), 143),
        (lambda: sys.exit(1), 1),
    ],
    ids=["ctrl-c", "sigterm", "sigterm-under-ray"],
)
def test_a_stopped_run_says_in_one_line_what_the_next_one_does(
    job: ModuleType,
    end: Callable[[], None],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from valley_ray.quickstart import road

    monkeypatch.setattr(road, "run", lambda config: end())
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    before = signal.getsignal(signal.SIGTERM)
    assert main(job) == status
    error = capsys.readouterr().err
    assert error.startswith("quickstart: stopped; run it again: it begins anew")
    assert error.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) == before
