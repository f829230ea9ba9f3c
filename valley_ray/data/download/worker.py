"""The downloads of one node: a Ray actor whose threads make attempts; one process and one sandbox for all of them.

Takes a fraction of a CPU and about 16 downloads at once: they wait for the network. The sandbox holds one decoder.
"""

from typing import Any

import ray

from valley_ray.data.download.attempt import Downloader, Outcome
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.credentials import Credentials
from valley_ray.data.download.sources import Row
from valley_ray.data.schema import PENDING
from valley_ray.errors import StorageError
from valley_ray.media.sandbox import Sandbox

_MAX_LOSSES = 3
"""Workers that an attempt may lose, as it is begun again after each."""


class DownloadWorker:
    """Ray actor; several calls run at once."""

    def __init__(self, config: DownloadConfig, credentials: list[Credentials]) -> None:
        self._downloader = Downloader(config, credentials, Sandbox(limits=config.sandbox))

    def attempt(self, row: Row, timeout_s: float, adopt: bool) -> Outcome:
        """As `Downloader.attempt`; a StorageError comes back as a pending outcome of that class."""
        try:
            return self._downloader.attempt(row, timeout_s=timeout_s, adopt=adopt)
        except StorageError as error:
            return Outcome(row.download_id, row.path, PENDING, error_class=error.code, error=str(error))

    def num_bytes_received(self) -> int:
        """Bytes that came so far."""
        return self._downloader.num_bytes_received


def start_workers(config: DownloadConfig, credentials: list[Credentials]) -> list[Any]:
    """Actor handles, spread over the nodes.

    A worker that dies is started again, on another node if need be, with the attempts that it had under way; what has
    arrived on disk is resumed. An attempt that loses several workers raises RayActorError.
    """
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    actor = ray.remote(DownloadWorker).options(
        num_cpus=config.cpus_per_worker,
        # One more than downloads, so that the progress line need not wait for one of them.
        max_concurrency=config.downloads_per_worker + 1,
        max_restarts=-1,
        max_task_retries=_MAX_LOSSES,
        scheduling_strategy="SPREAD",
    )
    return [actor.remote(config, credentials) for _ in range(config.num_workers or num_nodes)]
