"""jobs/quickstart.py: how it ends when it is told to."""

import signal

import pytest
from job_files import load_job


def test_a_stopped_run_says_in_one_line_what_the_next_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from valley_ray.quickstart import road

    monkeypatch.setattr(road, "run", lambda config: signal.raise_signal(signal.SIGTERM))
    assert load_job("quickstart").main([]) == 143
    error = capsys.readouterr().err
    assert error.startswith("quickstart: stopped; run it again: it begins anew")
    assert error.count("\n") == 1
