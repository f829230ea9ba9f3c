"""FrameSampler: MediaRef → cropped frames, on CPUs, in a sandbox. Asked by encoders on a miss. Loads no torch."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from ray.serve.handle import DeploymentHandle

from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox
from valley_ray.processor import read_processor_config
from valley_ray.serve import metrics
from valley_ray.serve.calls import PullCache, check_version, unwrapped
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.protocol import MediaRef
from valley_ray.serve.replica_log import say_refusals_in_a_line
from valley_ray.serve.second_try import Crashes, ask_twice

Frames = npt.NDArray[np.uint8]
"""uint8 [T, S, S, 3]."""


@dataclass(frozen=True)
class SampledFrames:
    """Frames of one clip or image, and what they cost this request."""

    frames: Frames
    decode_seconds: float | None = None
    """None: they were in the cache, or another request was getting them."""


class FrameSource(Protocol):
    """Who an encoder asks: a FrameSampler in its process, or the deployment."""

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> SampledFrames:
        """As `FrameSampler.frames`."""


class FrameSampler:
    """Decodes each clip once while it stays in the cache; a file that crashes or hangs costs itself only."""

    def __init__(self, config: ServeConfig) -> None:
        say_refusals_in_a_line()
        self._processing, self._version = read_processor_config(config.model), config.weights_version
        decode = config.sandbox.decode
        decode = decode.model_copy(update={"max_frames": min(decode.max_frames, config.max_frames)})
        limits = config.sandbox.model_copy(update={"decode": decode})
        self._sandbox = Sandbox(limits=limits, backend=config.video_decoder)
        self._cache: PullCache[Frames] = PullCache(
            config.sampler_cache_bytes, lambda frames: frames.nbytes, name="sampler"
        )

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> SampledFrames:
        """Frames uint8 [T, S, S, 3] of one clip or image, cropped as the model `version` wants them.

        Raises MediaError subclasses and SamplingError as the sandbox does; UnavailableError for another version.
        """
        check_version(version, self._version)
        is_folder = media.path is not None and Path(media.path).is_dir()
        sampling, crop = self._processing.media_plan(media.kind, sampling, is_folder=is_folder)

        decode_seconds: float | None = None

        async def decode() -> Frames:
            nonlocal decode_seconds
            source = Path(media.path) if media.path is not None else await _bytes_of(media)
            began = time.monotonic()
            frames = await asyncio.to_thread(self._sandbox.frames, source, sampling, crop=crop, name=media.name)
            decode_seconds = time.monotonic() - began
            metrics.STAGE_SECONDS.observe(decode_seconds, stage="decode")
            return frames.frames_THWC

        frames = await self._cache.get(f"{media.key}|{media.kind}|{sampling.key}", decode)
        return SampledFrames(frames, decode_seconds)

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
        self._handle, self._crashes = handle, Crashes()

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> SampledFrames:
        """As `FrameSampler.frames`; OverloadedError or UnavailableError where no replica can be asked.

        A second replica is asked where one ends over it; ReplicaCrashError where both do.
        """

        async def ask() -> SampledFrames:
            with unwrapped():
                frames: SampledFrames = await self._handle.frames.remote(media, sampling, version)
            return frames

        return await ask_twice(self._crashes, media.key, ask)
