"""jobs/answer.py as users run it on a cluster."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from asked import make_records
from two_nodes import Nodes, start_two_nodes, submit

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Nodes]:
    with start_two_nodes(tmp_path) as nodes:
        yield nodes


def test_a_submitted_job_answers_on_two_nodes(two_nodes: Nodes, tmp_path: Path, tiny_valley: Path) -> None:
    """Two actors of 0.75 CPUs fit two nodes of one CPU each, and no one of them. Paths are below the storage."""
    storage = tmp_path / "storage"
    make_records(storage / "set")
    shutil.copytree(tiny_valley, storage / "models" / "mine")
    words = ["model=models/mine", "input=set/records.json", "input=set", "question=Which colour?", "output=runs/out"]
    words += ["max_tokens=12", "block_size=2", "num_actors=2", "actor_cpus=0.75", "decode_cpus=0.25"]
    said = submit(two_nodes, "answer", words, storage=storage)
    assert "12: 9 ok, 3 failed (" in said
    assert str(storage / "runs" / "out" / "answers.parquet") in said
    lines = (storage / "runs" / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["status"] for line in lines].count("ok") == 9
    before = json.loads((storage / "runs" / "out" / "answers-summary.json").read_text(encoding="utf-8"))
    assert (before["rows_in"], before["asked"], before["repeated_rows"]) == (12, 11, 0)
