"""Sources of questions → an answer to each, every row accounted for: the room of batch answers.

    catalog/             what the sources hold, and while a run lasts, its questions and answers
    shards/              decoded clips, where no other folder of shards is named
    answers/ID/*.jsonl   the ledger: a line per answer as it comes (ledger.py); ID names model and settings

On Ray a pool of actors answers while tasks decode the next blocks (`on_ray`), else this process does both in turn; the
answers are the same. A run that was stopped is gone on with by running it again: no answer is asked for twice.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from valley_ray.data.commit import exclusive
from valley_ray.data.decoding import decode_stage
from valley_ray.data.journal import remove_journals
from valley_ray.data.mapped import mapped, pick
from valley_ray.data.metrics import DecodeProgress
from valley_ray.data.outcomes import Outcomes
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.data.sources import read_catalog, write_catalog
from valley_ray.data.stages import BLOCK_SCHEMA
from valley_ray.data.windows import known_outcomes, remove_leftovers
from valley_ray.errors import DataError
from valley_ray.evaluate.check import NOBODY_ASKS, check_model
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.evaluate.kinds import read_kinds
from valley_ray.evaluate.ledger import CLIPS_TYPE, LEDGER_SCHEMA, read_batches, read_status
from valley_ray.evaluate.questions import BATCH_ROWS, QUESTIONS_SCHEMA, read_questions
from valley_ray.evaluate.stages import TASK_SCHEMA, AnswerStage, LookStage, place_of

if TYPE_CHECKING:
    from valley_ray.processor import ValleyProcessor

CATALOG_DIR, SHARDS_DIR, ANSWERS_DIR = "catalog", "shards", "answers"

ANSWERS_SCHEMA = pa.schema(
    [
        *QUESTIONS_SCHEMA,
        ("prediction", pa.string()),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_new_tokens", pa.int32()),
        ("clips", CLIPS_TYPE),
    ]
)
"""answers: the questions with what came of them. status: ok or failed; prediction is null where it is failed. clips:
where the frames lie that were shown."""

Statuses = Sequence[dict[str, Any]]
"""Rows of STATUS_SCHEMA."""


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """All rows of the sources with what came of them; `rows_in` = `ok` + `failed` always. Tables lie on disk."""

    table: pa.Table
    """ANSWERS_SCHEMA, in the order of the sources."""
    clips: pa.Table
    """CLIPS_SCHEMA: the clips that the sources name."""
    catalog_dir: Path
    """Where tables of this run may lie too."""
    shards_dir: Path
    num_answered: int
    """Rows that this run worked on; the others were there, or could not be asked."""
    seconds: float

    @property
    def rows_in(self) -> int:
        """All rows."""
        return int(self.table.num_rows)

    @property
    def by_status(self) -> Counter[str]:
        """Rows by status."""
        return _counts(self.table["status"])

    @property
    def by_error_class(self) -> Counter[str]:
        """Failed rows by class."""
        return Counter({name: number for name, number in _counts(self.table["error_class"]).items() if name})


def answer(
    settings: AnswerSettings, model: Path, output: Path, *, on_ray: bool, shows_progress: bool = False
) -> AnswerSet:
    """Answer every question of the sources with the model of a folder.

    Args:
        settings: its `model` and `output` are not looked at.
        model: a model folder.
        output: folder that is written, or gone on with.
        on_ray: on the connected Ray, whose nodes all see both folders; else in this process.
        shows_progress: on stderr.

    Raises:
        CheckpointError: the model folder cannot be opened.
        DataError: a source cannot be read, there is no question in it, or another run writes to the folder.
        ConfigError: more GPUs than there are, or a video decoder that is not installed.
        StorageError: the disk is full or cannot be written.
    """
    start = time.perf_counter()
    settings, model, output = settings.under(Path.cwd()), model.absolute(), output.absolute()
    shards_dir, catalog_dir = settings.shards_dir or output / SHARDS_DIR, output / CATALOG_DIR
    check_model(model)
    with exclusive(output, setting="output"), exclusive(shards_dir, setting="shards_dir"):
        summary = write_catalog(settings.sources, catalog_dir)
        clips, samples = read_catalog(catalog_dir)
        kinds = read_kinds(settings.sources, summary)
        asked = read_questions(clips, samples, settings, summary=summary, kinds=kinds)
        questions = mapped(asked, QUESTIONS_SCHEMA, catalog_dir)
        if not questions.num_rows:
            raise DataError(NOBODY_ASKS)
        work = Work(settings, model, shards_dir, output, clips)
        keys, blocks = work.plan(questions)
        num_asked = sum(block.num_rows for block in blocks)
        with contextlib.ExitStack() as stack:
            progress = _progress(questions.num_rows, num_asked, stack) if shows_progress else None
            for statuses in work.on_ray(blocks) if on_ray else work.here(blocks):
                if progress is not None:
                    progress.count(statuses)
        answers = mapped(read_batches(work.directory), LEDGER_SCHEMA, catalog_dir)
        table = mapped(_joined(questions, keys, answers), ANSWERS_SCHEMA, catalog_dir)
    answered = AnswerSet(table, clips, catalog_dir, shards_dir, num_asked, time.perf_counter() - start)
    counts = answered.by_status
    assert counts[OK] + counts[FAILED] == questions.num_rows, f"rows lost: {counts}"
    return answered


class Work:
    """What is known before the first clip is decoded; the two folders must be this process's own to write.

    Attributes:
        directory: where the ledger lies.
        look: decodes the clips of a block.
        answer_arguments: those of AnswerStage.
    """

    def __init__(self, settings: AnswerSettings, model: Path, shards_dir: Path, output: Path, clips: pa.Table) -> None:
        from valley_ray.processor import ValleyProcessor

        processor = ValleyProcessor.from_pretrained(model)
        sampling = settings.sampling if settings.sampling is not None else processor.sampling
        self._settings, self._clips = settings, _Clips(clips)
        self._again = uuid.uuid4().hex if settings.retry_failed else ""
        decode = decode_stage(settings, shards_dir, processing=processor.config, sampling=sampling, again=self._again)
        remove_leftovers(shards_dir)
        self._known = known_outcomes(shards_dir, clips, decode.fingerprint)
        if self._again:
            self._known = Outcomes((name, one) for name, one in self._known.items() if one["status"] == OK)
        self.directory = output / ANSWERS_DIR / _run_key(settings, model, processor, decode.fingerprint)
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_journals(self.directory)
        self.look = LookStage(decode)
        self.answer_arguments = (model, shards_dir, self.directory, settings)

    def plan(self, questions: pa.Table) -> tuple[list[str], list[pa.Table]]:
        """The keys of all questions, and those that are still to be answered as blocks of TASK_SCHEMA.

        Questions about one clip come together, so that it is decoded once.
        """
        there = read_status(self.directory)
        done = {key for key, status in there.items() if status == OK or not self._again}
        keys: list[str] = []
        left: list[tuple[int, int]] = []
        for batch in questions.to_batches(max_chunksize=BATCH_ROWS):
            rows_here = batch.to_pylist()
            clips = self._clips.rows(one for row in rows_here for one in row["clip_ids"])
            for row in rows_here:
                keys.append(_key(row, clips))
                if row["status"] == PENDING and keys[-1] not in done:
                    left.append((self._clips.places[row["clip_ids"][0]] if row["clip_ids"] else -1, len(keys) - 1))
        rows, size = [row for _, row in sorted(left)], self._settings.block_size
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        return keys, [self._block(number, part, questions, keys) for number, part in enumerate(parts)]

    def here(self, blocks: Iterable[pa.Table]) -> Iterator[Statuses]:
        """Answer in this process."""
        stage: AnswerStage | None = None
        for block in blocks:
            stage = stage or AnswerStage(*self.answer_arguments)
            yield stage(self.look(block)).to_pylist()

    def on_ray(self, blocks: Sequence[pa.Table]) -> Generator[Statuses, None, None]:
        """Answer on Ray."""
        from valley_ray.evaluate.execution import answer_blocks

        return answer_blocks(blocks, self.look, self.answer_arguments, self._settings)

    def _block(self, number: int, rows: Sequence[int], questions: pa.Table, keys: Sequence[str]) -> pa.Table:
        named = "".join(keys[row] for row in rows) + self._again
        name = f"block-{hashlib.blake2b(named.encode(), digest_size=8).hexdigest()}"
        table = []
        taken = pick(questions.select(["messages", "clip_ids"]), rows).to_pylist()
        clips = self._clips.rows(one for question in taken for one in question["clip_ids"])
        for row, question in zip(rows, taken, strict=True):
            ids = dict.fromkeys(question["clip_ids"])
            undecoded = [{**clips[one], "window": number, "block": 0} for one in ids if one not in self._known]
            places = [place_of(self._known[one]) for one in ids if one in self._known]
            table.append({"block": name, "key": keys[row], **question, "undecoded": undecoded, "places": places})
        return pa.Table.from_pylist(table, schema=TASK_SCHEMA)


class _Clips:
    """Rows of the clips table by clip_id (BLOCK_SCHEMA without window and block).

    Attributes:
        places: clip_id -> number of its row.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.select([name for name in BLOCK_SCHEMA.names if name not in ("window", "block")])
        self.places = {clip_id: place for place, clip_id in enumerate(table["clip_id"].to_pylist())}

    def rows(self, clip_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those of `clip_ids`."""
        places = sorted({self.places[one] for one in clip_ids})
        return {clip["clip_id"]: clip for clip in pick(self._table, places).to_pylist()}


def _counts(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({one["values"]: one["counts"] for one in pc.value_counts(column).to_pylist()})


def _progress(num_rows: int, num_asked: int, stack: contextlib.ExitStack) -> DecodeProgress:
    return stack.enter_context(contextlib.closing(DecodeProgress(num_rows, num_rows - num_asked, what="answers")))


def _key(row: Mapping[str, Any], clips: Mapping[str, Mapping[str, Any]]) -> str:
    """Names a question and all that its answer depends on but the model and its settings."""
    shown = [[clips[one][name] for name in ("clip_id", "etag", "size_bytes")] for one in row["clip_ids"]]
    text = json.dumps([row["sample_id"], row["turn"], row["messages"], shown])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _run_key(settings: AnswerSettings, model: Path, processor: "ValleyProcessor", decoding: str) -> str:
    """Names the model, as its files are now, and the settings that answers depend on."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.iterdir())
    names = {"max_tokens", "precision", "temperature", "top_p"} | ({"seed"} if settings.temperature else set())
    # Two engines round differently. Ledgers from before there were two go on.
    names |= {"engine"} if settings.engine != "slots" else set()
    decides = settings.model_dump(mode="json", include=names)
    text = json.dumps([str(model), files, processor.fingerprint, decoding, decides], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _joined(questions: pa.Table, keys: Sequence[str], answers: pa.Table) -> Iterator[pa.RecordBatch]:
    """Questions with their answers (LEDGER_SCHEMA, each key once), one for one."""
    place_of_key = {key: place for place, key in enumerate(answers["key"].to_pylist())}
    unread = iter(keys)
    for batch in questions.to_batches(max_chunksize=BATCH_ROWS):
        asked = [(status == PENDING, next(unread)) for status in batch["status"].to_pylist()]
        missing = [key for is_asked, key in asked if is_asked and key not in place_of_key]
        assert not missing, f"no answer came to {len(missing)} of {batch.num_rows} questions, {missing[0]} is the first"
        own = sorted({place_of_key[key] for is_asked, key in asked if is_asked})
        place_here = {place: number for number, place in enumerate(own)}
        places = [place_here[place_of_key[key]] if is_asked else None for is_asked, key in asked]
        yield _beside(batch, pick(answers, own).take(pa.array(places, pa.int64())))


def _beside(questions: pa.RecordBatch, answers: pa.Table) -> pa.RecordBatch:
    """A batch of ANSWERS_SCHEMA; what became of a question is what its answer says, if it has one."""
    columns = [
        pc.coalesce(answers[name].combine_chunks(), questions[name])
        if name in ("status", "error_class", "error")
        else (questions[name] if name in questions.schema.names else answers[name].combine_chunks())
        for name in ANSWERS_SCHEMA.names
    ]
    return pa.record_batch(columns, schema=ANSWERS_SCHEMA)
