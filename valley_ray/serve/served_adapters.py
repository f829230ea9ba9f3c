"""What a decoder answers with: the model alone, or under an adapter that a request names."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.serve._private.common import RequestRoutingInfo
from ray.serve.context import _get_global_client as get_serve_client
from ray.serve.context import _get_internal_replica_context as get_replica_context

from valley_ray.answering import check_fit
from valley_ray.errors import CheckpointError, UnavailableError
from valley_ray.model.adapters import CoreAdapter, check_adapter, open_adapter
from valley_ray.model.core import ValleyCore
from valley_ray.processor import ValleyProcessor, read_processor_config
from valley_ray.processor.reading import CONFIG_FILE, open_tokenizer
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.shelf import Shelf

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What one request is answered with."""

    processor: ValleyProcessor
    version: str
    """Of what its visual tokens are made with."""
    adapter: str | None = None
    """By its name in the configuration."""
    weights: CoreAdapter | None = None
    """Of the adapter."""


class ServedAdapters:
    """The model of a decoder and its adapters, of which at most `max_adapters` are in memory."""

    def __init__(self, config: ServeConfig, core: ValleyCore, processor: ValleyProcessor) -> None:
        """Looks at all adapters, so that a replica with one that does not fit does not come up.

        Raises:
            CheckpointError: an adapter of another base or shape, or one whose frames would have to be cropped in
                another way.
        """
        self._config, self._core = config, core
        self._base = Served(processor, config.version_of(None))
        for folder in config.adapters.values():
            check_adapter(core, folder, allow_bin=config.allow_bin)
        self._processors = {name: _processor(folder, core, processor) for name, folder in config.adapters.items()}
        self._shelf: Shelf[Served] = Shelf(self._open, config.max_adapters, _tell_routers)

    @asynccontextmanager
    async def use(self, adapter: str | None) -> AsyncIterator[Served]:
        """What answers a request for `adapter`, which stays in memory meanwhile; None: the model alone.

        Raises UnavailableError for an adapter that this replica lacks (a redeploy in progress).
        """
        if adapter is None:
            yield self._base
            return
        if adapter not in self._processors:
            raise UnavailableError(f"this replica does not have the adapter {adapter!r} yet; try again shortly")
        async with self._shelf.use(adapter) as served:
            yield served

    def stats(self) -> dict[str, int]:
        """Counts since the replica started."""
        return {"num_adapters": len(self._shelf.names), "num_adapters_opened": self._shelf.num_opened}

    def _open(self, name: str) -> Served:
        weights = open_adapter(self._core, self._config.adapters[name], allow_bin=self._config.allow_bin)
        logger.info("opened the adapter %s, %.1f MB beside the model", name, weights.num_bytes / 2**20)
        return Served(self._processors[name], self._config.version_of(name), name, weights)


def _processor(folder: Path, core: ValleyCore, base: ValleyProcessor) -> ValleyProcessor:
    """An adapter's own prompts and tokenizer where its folder has them, else the model's."""
    has_config = (folder / CONFIG_FILE).is_file()
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    config = read_processor_config(folder) if has_config else base.config
    own = ValleyProcessor(open_tokenizer(folder) if has_tokenizer else base.tokenizer, config)
    check_fit(core.config, own)
    for field in ("video_crop", "image_crop", "image_mean", "image_std"):
        if getattr(own, field) != getattr(base, field):
            raise CheckpointError(
                f"{folder} has another {field} than the model, but frames are made once for all adapters; "
                "serve it as a model of its own"
            )
    return own


def _tell_routers(names: list[str]) -> None:
    """Serve's routers send requests for an adapter to the replicas that have it.

    What `@serve.multiplexed` does, which would unload adapters whose answers are still being written.
    """
    context = get_replica_context()
    if context is None or not ray.is_initialized():
        return  # no replica of a server: a test
    client = get_serve_client(raise_if_no_controller_running=False)
    if client is not None:
        client.record_request_routing_info(
            RequestRoutingInfo(replica_id=context.replica_id, multiplexed_model_ids=names)
        )
