"""Batch answers on a local Ray: those of one process, through workers that die."""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from asked import make_records, record, settings, unanswered

from valley_ray.errors import ConfigError
from valley_ray.evaluate.answer_files import answer_sources
from valley_ray.evaluate.answers import Work, answer
from valley_ray.evaluate.evaluation import evaluate
from valley_ray.evaluate.execution import answer_blocks
from valley_ray.evaluate.ledger import Answer, read_batches
from valley_ray.evaluate.stages import AnswerStage

pytestmark = pytest.mark.ray

KILLER = "Describe the clip"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("asked"))


def test_an_evaluation_on_ray_answers_as_one_process_does(tiny_valley: Path, records: Path, tmp_path: Path) -> None:
    here = answer(settings(records), tiny_valley, tmp_path / "here", on_ray=False)
    config = settings(records, model=tiny_valley, output=tmp_path / "out")
    result = evaluate(config)
    names = ["sample_id", "turn", "kind", "reference", "prediction", "finish_reason", "status", "error_class"]
    assert pq.read_table(result.predictions_path, columns=names).equals(here.table.select(names))
    assert (result.summary["rows_in"], result.summary["ok"], result.summary["failed"]) == (12, 9, 3)
    assert result.page_path.is_file()
    assert "12: 9 answered, 3 failed (media_not_recognised 1" in result.text()
    assert evaluate(config).summary["metrics"] == result.summary["metrics"]
    with pytest.raises(ConfigError, match="actor_gpus=1, Ray has 2 and 0"):
        evaluate(config.model_copy(update={"actor_gpus": 1.0, "output": tmp_path / "gpu"}))


def test_a_data_set_is_answered_on_ray_and_what_is_lost_is_asked_again(
    tiny_valley: Path, records: Path, tmp_path: Path
) -> None:
    here = answer(settings(records), tiny_valley, tmp_path / "here", on_ray=False)
    config = settings(records, model=tiny_valley, output=tmp_path / "out", shards_dir=here.shards_dir)
    summary = answer_sources(config)
    assert (summary.rows_in, summary.ok, summary.failed, summary.asked) == (12, 9, 3, 11)
    parquet, lines = (tmp_path / "out" / f"answers.{ending}" for ending in ("parquet", "jsonl"))
    assert pq.read_table(parquet)["answer"].to_pylist() == here.table["prediction"].to_pylist()
    before = lines.read_bytes()
    [ledger, *_] = sorted((tmp_path / "out" / "answers").glob("*/*.jsonl"))
    num_lost = len(ledger.read_bytes().splitlines())
    ledger.unlink()
    lines.unlink()
    again = answer_sources(config)
    assert (again.rows_in, again.asked, again.repeated_rows) == (12, num_lost, 0)
    assert lines.read_bytes() == before


@pytest.mark.slow
@pytest.mark.faults
def test_a_question_that_kills_its_worker_costs_that_row_alone(
    tiny_valley: Path, records: Path, tmp_path: Path
) -> None:
    killer = KILLER  # by value: workers do not see this file

    class DyingStage(AnswerStage):
        """Its process dies whenever it is asked one question, after the answers before it."""

        def _answers(self, rows: Sequence[Mapping[str, Any]], *, num_at_once: int | None = None) -> Iterator[Answer]:
            for row in rows:
                if row["messages"][-1]["content"].endswith(killer):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield from super()._answers([row], num_at_once=num_at_once)

    values = json.loads(records.read_text(encoding="utf-8"))
    path = records.with_name("killer.json")
    path.write_text(json.dumps([values[0], record("killer", "0.mp4", KILLER), *values[1:4]]), encoding="utf-8")
    config = settings(path, block_size=64)
    before = answer(config, tiny_valley, tmp_path / "before", on_ray=False)
    work = Work(config, tiny_valley, before.shards_dir, tmp_path / "dying", before.clips)
    keys, blocks = work.plan(unanswered(before.table))
    statuses = list(answer_blocks(blocks, work.look, work.answer_arguments, config, stage=DyingStage))
    assert sum(map(len, statuses)) == 5
    found = {answer["key"]: answer for batch in read_batches(work.directory) for answer in batch.to_pylist()}
    for key, row in zip(keys, before.table.to_pylist(), strict=True):
        if row["sample_id"] == "killer":
            assert found[key]["error_class"] == "answer_worker_died"
        else:
            assert found[key]["prediction"] == row["prediction"]
    lines = [line for one in work.directory.glob("*.jsonl") for line in one.read_text().splitlines()]
    assert len(lines) == 5, "no answer is made twice"
