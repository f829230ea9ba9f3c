"""FrameSampler: MediaRef → cropped frames, on CPUs, in a sandbox. Asked by encoders on a miss. Loads no torch."""

import asyncio
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from ray.serve.handle import DeploymentHandle

from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox
from valley_ray.processor import read_processor_config
from valley_ray.serve.calls import PullCache, check_version, unwrapped
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.protocol import MediaRef

Frames = npt.NDArray[np.uint8]
"""uint8 [T, S, S, 3]."""


class FrameSource(Protocol):
    """Who an encoder asks: a FrameSampler in its process, or the deployment."""

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> Frames:
        """As `FrameSampler.frames`."""


class FrameSampler:
    """Decodes each clip once while it stays in the cache; a file that crashes or hangs costs itself only."""

    def __init__(self, config: ServeConfig) -> None:
        self._processing, self._version = read_processor_config(config.model), config.weights_version
        decode = config.sandbox.decode
        decode = decode.model_copy(update={"max_frames": min(decode.max_frames, config.max_frames)})
        limits = config.sandbox.model_copy(update={"decode": decode})
        self._sandbox = Sandbox(limits=limits, backend=config.video_decoder)
        self._cache: PullCache[Frames] = PullCache(config.sampler_cache_bytes, lambda frames: frames.nbytes)

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> Frames:
        """Frames uint8 [T, S, S, 3] of one clip or image, cropped as the model `version` wants them.

        Raises MediaError subclasses and SamplingError as the sandbox does; UnavailableError for another version.
        """
        check_version(version, self._version)
        is_folder = media.path is not None and Path(media.path).is_dir()
        sampling, crop = self._processing.media_plan(media.kind, sampling, is_folder=is_folder)

        async def decode() -> Frames:
            source = Path(media.path) if media.path is not None else await _bytes_of(media)
            frames = await asyncio.to_thread(self._sandbox.frames, source, sampling, crop=crop, name=media.name)
            return frames.frames_THWC

        return await self._cache.get(f"{media.key}|{media.kind}|{sampling.key}", decode)

    def stats(self) -> dict[str, int]:
        """Counts since the replica started."""
        return {"num_hits": self._cache.num_hits, "num_misses": self._cache.num_misses}

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve tells the routers of callers."""
        return {"version": self._version}

    def __del__(self) -> None:
        self._sandbox.close()


async def _bytes_of(media: MediaRef) -> bytes:
    assert media.data is not None, "a MediaRef has a path or data"
    data: bytes = await media.data
    return data


class RemoteSampler:
    """The FrameSampler deployment as a FrameSource."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> Frames:
        """As `FrameSampler.frames`; OverloadedError or UnavailableError where no replica can be asked."""
        with unwrapped():
            frames: Frames = await self._handle.frames.remote(media, sampling, version)
        return frames
