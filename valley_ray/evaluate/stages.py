"""The work on a block of questions as plain callables: decode its clips, answer it. Ray calls them, none knows Ray."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.data.frame_store import FrameStore
from valley_ray.data.journal import BlockJournal
from valley_ray.data.schema import FAILED, OK
from valley_ray.data.stages import BLOCK_SCHEMA, DecodeStage
from valley_ray.errors import AnswerWorkerError, ConversationError, ValleyError
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.evaluate.ledger import Answer, LedgerWriter, read_answers
from valley_ray.evaluate.questions import MESSAGE_TYPE

if TYPE_CHECKING:
    from valley_ray.evaluate.room import Answered, Asked

PLACE_TYPE = pa.struct(
    [
        ("clip_id", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)

TASK_SCHEMA = pa.schema(
    [
        ("block", pa.string()),
        ("key", pa.string()),
        ("messages", pa.list_(MESSAGE_TYPE)),
        ("clip_ids", pa.list_(pa.string())),
        ("undecoded", pa.list_(pa.struct(list(BLOCK_SCHEMA)))),
        ("places", pa.list_(PLACE_TYPE)),
    ]
)
"""One block of questions. block: its name. key: names the question and everything that its answer depends on but the
model. undecoded: those of its clips that are still to be decoded; places: what came of the others."""

STATUS_SCHEMA = pa.schema([("key", pa.string()), ("status", pa.string()), ("error_class", pa.string())])
"""What answering a block gives back; the answers themselves are in the ledger."""


class LookStage:
    """Block (TASK_SCHEMA) → the same with every clip decoded, and its place. Needs what DecodeStage needs."""

    def __init__(self, decode: DecodeStage) -> None:
        self._decode = decode

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        clips = {clip["clip_id"]: clip for row in rows for clip in row["undecoded"]}
        if not clips:
            return block
        outcomes = self._decode(pa.Table.from_pylist(list(clips.values()), schema=BLOCK_SCHEMA))
        made = {outcome["clip_id"]: outcome for outcome in outcomes.to_pylist()}
        for row in rows:
            row["places"] += [place_of(made[clip["clip_id"]]) for clip in row["undecoded"]]
            row["undecoded"] = []
        return pa.Table.from_pylist(rows, schema=TASK_SCHEMA)


def place_of(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A row of PLACE_TYPE from what came of a clip."""
    return {field.name: outcome[field.name] for field in PLACE_TYPE}


class AnswerStage:
    """Block of questions (TASK_SCHEMA, all clips decoded) → their statuses; the answers are appended to the ledger.

    Needs the memory of the model, `num_slots` prompts and a few clips. A question that fails is a row with its reason.
    Called again with a block whose worker died, it goes on after the answers that are there, one question at a time,
    so that a question which kills its worker is found out and becomes a failed row.
    """

    def __init__(self, model: Path, shards_dir: Path, directory: Path, settings: AnswerSettings) -> None:
        import transformers

        from valley_ray.evaluate.room import AnswerRoom

        # A bar for each worker would bury the progress line.
        transformers.utils.logging.disable_progress_bar()
        frames = FrameStore(shards_dir).frames
        self._directory = directory
        self._room: AnswerRoom = AnswerRoom.open(
            model, frames, settings, device="cuda" if settings.actor_gpus else "cpu"
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        path = self._directory / f"{rows[0]['block']}.jsonl"
        with BlockJournal(self._directory, rows[0]["block"]) as journal, LedgerWriter(path) as ledger:
            there = read_answers(path)
            left = [row for row in rows if row["key"] not in there]
            had_deaths = journal.deaths_between or journal.deaths
            for answer in self._carefully(left, journal) if had_deaths else self._answers(left):
                ledger.append(answer)
        found = read_answers(path)
        return pa.Table.from_pylist([found[row["key"]] for row in rows], schema=STATUS_SCHEMA)

    def _answers(self, rows: Sequence[Mapping[str, Any]], *, num_at_once: int | None = None) -> Iterator[Answer]:
        clips = {row["key"]: _clips_of(row) for row in rows}
        good: list[Asked] = []
        for row in rows:
            bad = next((clip for clip in clips[row["key"]] if clip["status"] != OK), None)
            if bad is not None:
                yield failed_answer(row["key"], bad["error_class"], bad["error"])
                continue
            try:
                good.append(_asked(row, clips[row["key"]]))
            except ValleyError as error:
                yield failed_answer(row["key"], error.code, str(error))
        for one in self._room.answers(good, num_at_once=num_at_once):
            yield _answer(one, clips[one.key])

    def _carefully(self, rows: Sequence[Mapping[str, Any]], journal: BlockJournal) -> Iterator[Answer]:
        for row in rows:
            if deaths := journal.deaths[row["key"]]:
                reason = f"the worker died while it answered this question alone ({deaths} times)"
                yield failed_answer(row["key"], AnswerWorkerError.code, reason)
                continue
            journal.begin(row["key"])
            yield from self._answers([row], num_at_once=1)
            journal.end()


def failed_answer(key: str, error_class: str, error: str) -> Answer:
    """The ledger's line of a question without an answer."""
    nothing: Answer = {"prediction": None, "finish_reason": None, "num_prompt_tokens": 0, "num_new_tokens": 0}
    return nothing | {"key": key, "clips": [], "status": FAILED, "error_class": error_class, "error": error}


def _clips_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    places = {place["clip_id"]: place for place in row["places"]}
    return [places[clip_id] for clip_id in row["clip_ids"]]


def _asked(row: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> "Asked":
    from valley_ray.evaluate.room import Asked

    conversation = Conversation(tuple(Message(one["role"], one["content"]) for one in row["messages"]))
    if conversation.num_media != len(clips):
        raise ConversationError(f"{conversation.num_media} media marks for {len(clips)} clips; give one for each")
    return Asked(row["key"], conversation, tuple((clip["shard"], clip["row"]) for clip in clips))


def _answer(answered: "Answered", clips: Sequence[Mapping[str, Any]]) -> Answer:
    if answered.error is not None:
        return failed_answer(answered.key, answered.error.code, str(answered.error))
    return {
        "key": answered.key,
        "prediction": answered.text,
        "finish_reason": answered.finish_reason,
        "num_prompt_tokens": answered.num_prompt_tokens,
        "num_new_tokens": answered.num_new_tokens,
        "clips": [{"shard": clip["shard"], "row": clip["row"]} for clip in clips],
        "status": OK,
        "error_class": "",
        "error": "",
    }
