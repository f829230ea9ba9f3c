"""A small set of questions about generated clips, with rows that fail in every way there is before a model is asked."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from clips import write_clip

from valley_ray.data.schema import PENDING
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.evaluate.questions import QUESTIONS_SCHEMA

NUM_CLIPS = 3
QUESTIONS = ("What is moving?", "How many shapes do you see?", "Which colour?")


def make_records(folder: Path) -> Path:
    """Three clips and three questions about each; a broken file, a missing one, a record without turns."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for seed in range(NUM_CLIPS):
        write_clip(folder / f"{seed}.mp4", seed=seed)
    for question in QUESTIONS:
        for seed in range(NUM_CLIPS):
            records.append(record(f"{seed}-{question}", f"{seed}.mp4", question))
    (folder / "broken.mp4").write_bytes(b"no video")
    records.insert(2, record("broken", "broken.mp4", "What is moving?"))
    records.insert(5, record("missing", "missing.mp4", "What is moving?"))
    records.append({"id": "no turns", "video": "0.mp4"})
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def record(name: str, video: str, question: str) -> dict[str, Any]:
    """One record with one turn."""
    turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": "A red circle moves left."}]
    return {"id": name, "video": video, "conversations": turns, "kind": question.partition(" ")[0]}


def unanswered(table: pa.Table) -> pa.Table:
    """The questions of a table of answers, as they were before; those that could not be asked are left out."""
    rows = [row | {"status": PENDING} for row in table.to_pylist() if row["messages"]]
    return pa.Table.from_pylist(rows, schema=QUESTIONS_SCHEMA)


def settings(records: Path, **changes: Any) -> EvaluationConfig:
    """Short answers in blocks of four, two at once."""
    values = {"max_tokens": 12, "block_size": 4, "num_slots": 2} | changes
    return EvaluationConfig(sources=[{"path": str(records)}], **values)
