"""jobs/evaluate.py: help, and mistakes in one line before Ray starts."""

from pathlib import Path
from types import ModuleType

import pytest
from asked import make_records
from job_files import load_job


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return load_job("evaluate")


def test_help_says_what_it_does(job: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--help"]) == 0
    assert "predictions.parquet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sources=[{path: none.json}]"], "no such file"),
        (["sources=[{path: records.json}]", "model=nowhere"], "is no model folder"),
        (["sources=[{path: records.json}]", "metric=[bleu]"], "unknown key 'metric'; did you mean 'metrics'?"),
        (["sources=[{path: records.json}]", "metrics=[blue]"], "metrics.0='blue'"),
        (["sources=[{path: records.json}]", "best=bertscore"], "best='bertscore' is none of the metrics"),
        (["sources=[{path: records.json}]", "top_p=0.5"], "set temperature or drop top_p"),
        (["a.yaml", "b.yaml"], "got a.yaml and b.yaml; drop one"),
        (["--input", "records.json"], "unknown option --input; records are named by 'sources=["),
        (["none.yaml"], "cannot read configuration none.yaml"),
    ],
)
def test_mistakes_are_one_line_and_status_two(
    job: ModuleType,
    words: list[str],
    said: str,
    tiny_valley: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_records(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALLEY_STORAGE", str(tmp_path))
    monkeypatch.setattr(job, "connect", lambda: pytest.fail("Ray was started"))
    model = (
        [] if any(word.startswith("model=") or word.endswith(".yaml") for word in words) else [f"model={tiny_valley}"]
    )
    assert job.main([*words, *model]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("evaluate: error: ")
    assert said in captured.err
