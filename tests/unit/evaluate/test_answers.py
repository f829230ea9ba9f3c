"""Batch answers in one process: those of the assistant, every row accounted for, none asked for twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from asked import NUM_CLIPS, QUESTIONS, make_records, record, settings, unanswered
from PIL import Image

from valley_ray.assistant import Assistant
from valley_ray.chat.conversation import Conversation, Message
from valley_ray.data.journal import BlockJournal
from valley_ray.data.schema import CLIPS_SCHEMA
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import CheckpointError, DataError
from valley_ray.evaluate import room
from valley_ray.evaluate.answers import ANSWERS_DIR, SHARDS_DIR, AnswerSet, Work, answer
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.evaluate.ledger import LedgerWriter, read_answers
from valley_ray.evaluate.stages import AnswerStage


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path, records: Path) -> tuple[Path, AnswerSet]:
    output = tmp_path_factory.mktemp("answers") / "out"
    return output, answer(settings(records), tiny_valley, output, on_ray=False)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the questions that a model was asked."""
    keys: list[str] = []
    begin = room.AnswerRoom._begin

    def counted(self: room.AnswerRoom, asked: room.Asked) -> Any:
        keys.append(asked.key)
        return begin(self, asked)

    monkeypatch.setattr(room.AnswerRoom, "_begin", counted)
    return keys


def predictions(answers: AnswerSet) -> dict[str, str | None]:
    return {row["sample_id"]: row["prediction"] for row in answers.table.to_pylist()}


def test_greedy_answers_are_the_assistants(answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path) -> None:
    found = predictions(answered[1])
    params = SamplingParams(max_tokens=12)
    with Assistant.from_pretrained(tiny_valley) as assistant:
        asked = {
            f"{seed}-{text}": assistant.ask(text, video=records.parent / f"{seed}.mp4", params=params).text
            for text in QUESTIONS
            for seed in range(NUM_CLIPS)
        }
    assert {name: found[name] for name in asked} == asked
    assert len(set(asked.values())) > 3, "the questions must not all have one answer"


def test_images_several_clips_texts_and_later_turns_are_the_assistants_too(
    answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path, tmp_path: Path
) -> None:
    folder = records.parent
    Image.linear_gradient("L").convert("RGB").save(folder / "image.png")
    asked = [
        ({"image": "image.png"}, ["<image>\nDescribe the clip"]),
        ({"video": ["0.mp4", "1.mp4"]}, ["<video>\n<video>\nWhich colour?"]),
        ({}, ["yes no"]),
        ({"video": "2.mp4"}, ["<video>\nWhat is moving?", "How many shapes do you see?"]),
    ]
    values = []
    for number, (media, texts) in enumerate(asked):
        turns = [
            turn for text in texts for turn in ({"from": "human", "value": text}, {"from": "gpt", "value": "One."})
        ]
        values.append({"id": str(number), "conversations": turns} | media)
    path = folder / "others.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    found = answer(settings(path), tiny_valley, tmp_path / "out", on_ray=False).table["prediction"].to_pylist()
    params = SamplingParams(max_tokens=12)
    clips = [folder / f"{seed}.mp4" for seed in range(NUM_CLIPS)]
    said = [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": str(clips[2])}},
                {"type": "text", "text": "What is moving?"},
            ],
        },
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "How many shapes do you see?"},
    ]
    with Assistant.from_pretrained(tiny_valley) as assistant:
        expected = [
            assistant.ask("Describe the clip", image=folder / "image.png", params=params).text,
            assistant.ask("Which colour?", video=clips[:2], params=params).text,
            assistant.ask("yes no", params=params).text,
            assistant.ask("What is moving?", video=clips[2], params=params).text,
            assistant.ask(said, params=params).text,
        ]
    assert found == expected


def test_every_row_is_there_in_order_with_what_came_of_it(answered: tuple[Path, AnswerSet], records: Path) -> None:
    answers = answered[1]
    ids = [one["id"] for one in json.loads(records.read_text(encoding="utf-8"))]
    assert answers.table["sample_id"].to_pylist() == ids
    assert answers.by_status == {"ok": 9, "failed": 3}
    failed = {row["sample_id"]: row for row in answers.table.to_pylist() if row["status"] == "failed"}
    assert {name: row["error_class"] for name, row in failed.items()} == {
        "broken": "media_not_recognised",
        "missing": "source_not_found",
        "no turns": "invalid_conversation",
    }
    assert all(row["prediction"] is None and row["error"] for row in failed.values())
    assert answers.num_answered == 11, "what cannot be read is not asked"


def test_a_second_run_asks_nothing_and_gives_the_same(
    answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path, begun: list[str]
) -> None:
    output, before = answered
    again = answer(settings(records), tiny_valley, output, on_ray=False)
    assert (begun, again.num_answered) == ([], 0)
    assert again.table.equals(before.table)


def test_a_stopped_run_is_gone_on_with_row_by_row(
    answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path, tmp_path: Path, begun: list[str]
) -> None:
    _, before = answered
    output = tmp_path / "out"
    answer(settings(records), tiny_valley, output, on_ray=False)
    [directory] = (output / ANSWERS_DIR).iterdir()
    # What a kill leaves: one file lacks its last answers and ends within a line, another was not begun.
    paths = sorted(directory.glob("*.jsonl"))
    whole = paths[0].read_bytes().splitlines(keepends=True)
    paths[0].write_bytes(whole[0] + whole[1][:-9])
    lost = [json.loads(line)["key"] for line in [*whole[1:], *paths[1].read_bytes().splitlines()]]
    paths[1].unlink()
    begun.clear()
    again = answer(settings(records), tiny_valley, output, on_ray=False)
    assert again.num_answered == len(lost)
    assert set(begun) <= set(lost)
    assert again.table.drop_columns(["clips"]).equals(before.table.drop_columns(["clips"]))


def test_answers_of_another_model_or_other_settings_are_others(
    answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path, begun: list[str]
) -> None:
    output, before = answered
    shorter = answer(settings(records, max_tokens=2), tiny_valley, output, on_ray=False)
    assert shorter.num_answered == 11
    assert predictions(shorter) != predictions(before)
    assert len(list((output / ANSWERS_DIR).iterdir())) == 2


def test_answers_of_another_engine_are_others(tiny_valley: Path, records: Path, tmp_path: Path) -> None:
    clips = CLIPS_SCHEMA.empty_table()
    changes: list[dict[str, str]] = [{}, {"engine": "slots"}, {"engine": "vllm"}]
    settled = [settings(records, **change) for change in changes]
    first, same, other = (Work(one, tiny_valley, tmp_path / "shards", tmp_path, clips).directory for one in settled)
    assert first == same != other


def test_what_failed_is_asked_again_on_request_and_then_counts(tiny_valley: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path / "set")
    output = tmp_path / "out"
    answer(settings(records), tiny_valley, output, on_ray=False)
    good = (records.parent / "0.mp4").read_bytes()
    (records.parent / "missing.mp4").write_bytes(good)
    again = answer(settings(records, retry_failed=True), tiny_valley, output, on_ray=False)
    assert (again.num_answered, again.by_status) == (2, {"ok": 10, "failed": 2})
    assert predictions(again)["missing"] is not None
    after = answer(settings(records), tiny_valley, output, on_ray=False)
    assert (after.num_answered, after.by_status) == (0, {"ok": 10, "failed": 2})


def test_a_changed_question_is_asked_again_and_the_others_are_not(tiny_valley: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path / "set")
    answer(settings(records), tiny_valley, tmp_path / "out", on_ray=False)
    values = json.loads(records.read_text(encoding="utf-8"))
    values[0] = record(values[0]["id"], values[0]["video"], "Describe the clip")
    records.write_text(json.dumps(values), encoding="utf-8")
    assert answer(settings(records), tiny_valley, tmp_path / "out", on_ray=False).num_answered == 1


def test_shards_of_a_prepared_set_are_not_decoded_again(
    answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before = answered
    from valley_ray.data.stages import DecodeStage

    monkeypatch.setattr(DecodeStage, "__call__", lambda *_: pytest.fail("a clip was decoded"))
    shared = settings(records, shards_dir=output / SHARDS_DIR)
    again = answer(shared, tiny_valley, tmp_path / "elsewhere", on_ray=False)
    assert again.table.drop_columns(["clips"]).equals(before.table.drop_columns(["clips"]))


def test_each_clip_is_decoded_once_however_questions_are_ordered(answered: tuple[Path, AnswerSet]) -> None:
    from valley_ray.data.frame_store import read_shard_records, shard_paths

    shards = shard_paths(answered[0] / SHARDS_DIR)
    decoded = [clip["clip_id"] for path in shards for clip in read_shard_records(path)[1]]
    # Questions about one clip stand apart in the file; a block of four may cut them once.
    assert len(decoded) <= len(set(decoded)) + len(shards) - 1
    assert len(set(decoded)) == NUM_CLIPS + 2


def test_random_answers_depend_on_the_seed_and_not_on_their_place(
    tiny_valley: Path, records: Path, tmp_path: Path
) -> None:
    drawn = {"temperature": 1.0, "shards_dir": tmp_path / "shards"}
    first = answer(settings(records, **drawn), tiny_valley, tmp_path / "a", on_ray=False)
    other = answer(settings(records, num_slots=5, block_size=64, **drawn), tiny_valley, tmp_path / "b", on_ray=False)
    assert predictions(first) == predictions(other)
    again = answer(settings(records, seed=1, **drawn), tiny_valley, tmp_path / "a", on_ray=False)
    assert predictions(first) != predictions(again)


def test_a_question_too_long_for_the_model_is_a_failed_row(tiny_valley: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path / "set")
    values = json.loads(records.read_text(encoding="utf-8"))
    records.write_text(json.dumps([values[0], record("long", "0.mp4", "moving " * 600)]), encoding="utf-8")
    rows = answer(settings(records), tiny_valley, tmp_path / "out", on_ray=False).table.to_pylist()
    assert [(row["status"], row["error_class"]) for row in rows] == [("ok", ""), ("failed", "prompt_too_long")]


def test_a_question_that_kills_its_worker_alone_is_a_failed_row(
    answered: tuple[Path, AnswerSet], tiny_valley: Path, records: Path, tmp_path: Path
) -> None:
    config = settings(records, shards_dir=answered[0] / SHARDS_DIR, block_size=64)
    work = Work(config, tiny_valley, answered[0] / SHARDS_DIR, tmp_path, answered[1].clips)
    questions = unanswered(answered[1].table)
    good = [name not in ("broken", "missing") for name in questions["sample_id"].to_pylist()]
    keys, [block] = work.plan(questions.filter(pa.array(good)))
    # Two earlier workers: one died while many were under way, the next one with this question alone.
    name = block["block"][0].as_py()
    BlockJournal(work.directory, name).__enter__()
    BlockJournal(work.directory, name).__enter__().begin(keys[3])
    stage = AnswerStage(*work.answer_arguments)
    statuses = {row["key"]: row["error_class"] for row in stage(work.look(block)).to_pylist()}
    assert statuses == {key: "answer_worker_died" if key == keys[3] else "" for key in keys}
    assert not list(work.directory.glob("*.journal"))


def test_questions_are_taken_as_slots_come_free(tiny_valley: Path, records: Path) -> None:
    taken: list[str] = []

    def questions() -> Iterator[room.Asked]:
        for number in range(40):
            taken.append(str(number))
            yield room.Asked(str(number), Conversation((Message("user", "one two " * (number % 5 + 1)),)), ())

    def no_frames(shard: str, row: int) -> Any:
        raise AssertionError("no question shows a clip")

    opened = room.AnswerRoom.open(tiny_valley, no_frames, settings(records, num_slots=4), device="cpu")
    answers = opened.answers(questions())
    first = next(answers)
    assert len(taken) == 4, "as many as there are slots"
    rest = [one.key for one in answers]
    assert sorted([first.key, *rest]) == sorted(taken)
    assert len(taken) == 40


def test_what_cannot_be_read_at_all_is_said(tiny_valley: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        answer(settings(records), tmp_path / "nowhere", tmp_path / "out", on_ray=False)
    with pytest.raises(DataError, match="no such file"):
        answer(settings(tmp_path / "none.json"), tiny_valley, tmp_path / "out", on_ray=False)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    folder = EvaluationConfig(sources=[{"path": str(tmp_path / "clips")}])
    with pytest.raises(DataError, match="set question"):
        answer(folder, tiny_valley, tmp_path / "out", on_ray=False)


def test_the_ledger_keeps_the_first_of_a_key_and_drops_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "block.jsonl"
    with LedgerWriter(path) as ledger:
        ledger.append({"key": "a", "prediction": "1"})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "predic')
    with LedgerWriter(path) as ledger:
        ledger.append({"key": "c", "prediction": "\n"})
        ledger.append({"key": "a", "prediction": "2"})
    assert {key: one["prediction"] for key, one in read_answers(path).items()} == {"a": "1", "c": "\n"}
    assert read_answers(tmp_path / "none.jsonl") == {}
