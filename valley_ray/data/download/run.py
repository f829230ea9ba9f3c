"""Downloads, top to bottom: lists → rows → attempts on the cluster → ledger, clips table, summary.

The driver hands single attempts to the workers and keeps the schedule and the ledger; a worker keeps nothing.
"""

import dataclasses
import errno
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from valley_ray.data.commit import exclusive
from valley_ray.data.download.attempt import Outcome
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.credentials import read_credentials
from valley_ray.data.download.ledger import LEDGER_FILE, Ledger
from valley_ray.data.download.page import require_yt_dlp
from valley_ray.data.download.partial import disk_errors
from valley_ray.data.download.progress import Progress
from valley_ray.data.download.results import DownloadSummary, write_results
from valley_ray.data.download.schedule import Schedule
from valley_ray.data.download.sources import Row, read_rows
from valley_ray.data.download.worker import start_workers
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.errors import FetchTimeoutError, StorageError
from valley_ray.session import connect

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 2.0
_NOTHING_YET = Outcome("", "", PENDING)


def run_downloads(config: DownloadConfig, *, on_progress: Callable[[str], None] = lambda line: None) -> DownloadSummary:
    """Fetch what the lists of `config` name, as far as earlier runs have not; every row ends as ok or failed.

    Connects this process to Ray where it is not yet and something is to be fetched.

    Args:
        on_progress: gets a line every two seconds.

    Raises:
        DataError: a list that cannot be read, or another run with the same ledger.
        ConfigError: headers or cookies that cannot be read; yt-dlp is wanted and missing; RAY_ADDRESS cannot be joined.
        StorageError: the disk is full or not writable; what was finished is recorded, and the next run goes on.
    """
    rows = read_rows(config)
    credentials = [read_credentials(source) for source in config.sources]
    if any(row.method == "page" for row in rows):
        require_yt_dlp()
    folder = config.ledger_folder
    with disk_errors(folder / LEDGER_FILE):
        config.media_root.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with exclusive(folder, setting="media_root or ledger_dir"):
        ledger = Ledger(folder, rows)
        wanted = {row.download_id: row for row in reversed(rows) if not row.error}
        pending = [row for row in reversed(wanted.values()) if not _is_settled(row, ledger, config)]
        ledger.commit()
        progress = Progress(num_files=len(wanted), taken_over=len(wanted) - len(pending))
        try:
            if pending:
                connect(include_dashboard=False)
                workers = start_workers(config, credentials)
                _Run(config, ledger, progress, workers, on_progress).work(pending)
        finally:
            ledger.commit()
        return write_results(config, rows, ledger.rows(), progress)


@dataclasses.dataclass(slots=True)
class _Job:
    """A download under way: its row and what its attempts have come to."""

    row: Row
    outcome: Outcome = _NOTHING_YET
    worker: int = -1


class _Run:
    """The loop: begin what the schedule allows, take what has ended, until nothing is left."""

    def __init__(
        self,
        config: DownloadConfig,
        ledger: Ledger,
        progress: Progress,
        workers: Sequence[Any],
        on_progress: Callable[[str], None],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._progress = progress
        self._workers = workers
        self._on_progress = on_progress
        self._schedule: Schedule[_Job] = Schedule(config.host_limits)
        self._running: dict[Any, _Job] = {}
        self._load = [0] * len(workers)
        self._random = random.Random(0)
        self._next_line = time.monotonic() + _PROGRESS_EVERY_S
        self._num_bytes_received = 0

    def work(self, rows: Sequence[Row]) -> None:
        """Bring every row to its end."""
        for row in rows:
            self._schedule.add(row.host, _Job(row))
        try:
            while self._schedule.num_waiting or self._running:
                self._begin()
                for reference in self._ended():
                    job = self._running.pop(reference)
                    self._load[job.worker] -= 1
                    self._take(job, reference)
                if time.monotonic() >= self._next_line:
                    self._tell()
            self._tell()
        finally:
            for worker in self._workers:
                ray.kill(worker)

    def _begin(self) -> None:
        while min(self._load) < self._config.downloads_per_worker:
            job = self._schedule.take(time.monotonic())
            if job is None:
                return
            job.worker = self._load.index(min(self._load))
            self._load[job.worker] += 1
            left_s = self._config.timeout_s - job.outcome.seconds
            adopt = job.outcome.attempts == 0 and not self._ledger.is_known_path(job.row.path)
            reference = self._workers[job.worker].attempt.remote(job.row, left_s, adopt)
            self._running[reference] = job

    def _ended(self) -> list[Any]:
        """References of attempts that have ended; waits until one has, or something may begin, or a line is due."""
        now = time.monotonic()
        next_at = self._schedule.next_at() if min(self._load) < self._config.downloads_per_worker else None
        wait_s = max(0.0, min(self._next_line, next_at if next_at is not None else self._next_line) - now)
        if not self._running:
            time.sleep(wait_s)
            return []
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=wait_s)
        if ended:
            ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return list(ended)

    def _take(self, job: _Job, reference: Any) -> None:
        try:
            came: Outcome = ray.get(reference)
        except RayActorError as error:
            reason = f"worker after worker died with it ({' '.join(str(error).split())[:120]})"
            came = Outcome(job.row.download_id, job.row.path, FAILED, "worker_died", reason, attempts=1)
        except RayTaskError as error:
            logger.error("%s: %s", job.row.path, error)
            reason = f"a fault of this program: {error.cause!r:.200}"
            came = Outcome(job.row.download_id, job.row.path, FAILED, error_class="internal_error", error=reason)
        self._schedule.finish(job.row.host, num_requests=came.num_requests)
        if came.error_class == StorageError.code:
            raise StorageError(came.error)
        job.outcome = dataclasses.replace(
            came, attempts=job.outcome.attempts + came.attempts, seconds=job.outcome.seconds + came.seconds
        )
        if came.status == PENDING and self._may_try_again(job):
            self._again(job)
        else:
            self._end(job)

    def _may_try_again(self, job: _Job) -> bool:
        return job.outcome.attempts < self._config.retry.max_attempts and job.outcome.seconds < self._config.timeout_s

    def _again(self, job: _Job) -> None:
        retry, came = self._config.retry, job.outcome
        pause_s = retry.backoff_s * 2 ** (came.attempts - 1) * self._random.uniform(0.5, 1.0)
        pause_s = min(retry.max_pause_s, max(pause_s, came.retry_after_s or 0.0))
        until = time.monotonic() + pause_s
        if came.retry_after_s is not None:
            self._schedule.pause(job.row.host, until)
        self._schedule.add(job.row.host, job, not_before=until)
        self._progress.retries += 1
        logger.info("%s: %s; again in %.1f s", job.row.path, came.error, pause_s)

    def _end(self, job: _Job) -> None:
        status = OK if job.outcome.status == OK else FAILED
        job.outcome = dataclasses.replace(job.outcome, status=status)
        if status == FAILED and job.outcome.seconds >= self._config.timeout_s:
            job.outcome = dataclasses.replace(job.outcome, error_class=FetchTimeoutError.code)
        self._ledger.record(job.outcome)
        self._progress.ended[status] += 1
        if status == FAILED:
            self._progress.errors[job.outcome.error_class] += 1
        elif job.outcome.attempts == 0:
            self._progress.found += 1
        else:
            self._progress.fetched_bytes += job.outcome.size_bytes or 0

    def _tell(self) -> None:
        try:
            counts = ray.get([worker.num_bytes_received.remote() for worker in self._workers], timeout=1.0)
            self._num_bytes_received = max(self._num_bytes_received, sum(counts))
        except (RayActorError, GetTimeoutError):
            logger.debug("a worker did not say how much it has received")
        self._on_progress(
            self._progress.line(num_running=len(self._running), num_bytes_received=self._num_bytes_received)
        )
        self._next_line = time.monotonic() + _PROGRESS_EVERY_S


def _is_settled(row: Row, ledger: Ledger, config: DownloadConfig) -> bool:
    """Whether an earlier outcome holds: the file is there as it was, or it failed and is not to be tried again."""
    outcome = ledger.outcome(row.download_id)
    if outcome is None:
        return False
    if outcome.status == FAILED:
        holds = not config.retry_failed
    else:
        holds = (
            outcome.path == row.path
            and row.sha256 in ("", outcome.sha256)
            and row.size_bytes in (None, outcome.size_bytes)
            and _size_on_disk(config, row.path) == outcome.size_bytes
        )
    if not holds:
        ledger.forget(row.download_id)
    return holds


def _size_on_disk(config: DownloadConfig, path: str) -> int | None:
    try:
        return os.stat(config.media_root / path).st_size
    except OSError:
        return None
