"""VisionEncoder: MediaRef → visual tokens [P + T, D]; tower and projector of the model. Asked by decoders on a miss."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from valley_ray.answering import check_fit, encode_features, load_model
from valley_ray.media.sampling import FrameSampling
from valley_ray.model.adapters import open_visual_part
from valley_ray.model.core import ValleyCore
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.serve import metrics
from valley_ray.serve.calls import PullCache, check_version, unwrapped
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.protocol import MediaRef
from valley_ray.serve.replica_log import say_refusals_in_a_line
from valley_ray.serve.sampler import Frames, FrameSource, RemoteSampler
from valley_ray.serve.second_try import Crashes, ask_twice
from valley_ray.serve.shelf import Shelf


@dataclass(frozen=True)
class EncodedMedia:
    """Visual tokens of one clip or image, and what they cost this request; None where a cache had what was needed, or
    another request was getting it."""

    tokens: torch.Tensor
    """[P + T, D], on the CPU."""
    decode_seconds: float | None = None
    encode_seconds: float | None = None
    """Waiting for the batch included."""

    def __reduce__(self) -> tuple[Any, ...]:
        # torch would pickle 2 MB of tokens into the message, 13 ms on each side; numpy's bytes travel beside it.
        payload = self.tokens.detach().contiguous().view(torch.uint8).numpy()
        return _received, (payload, self.tokens.dtype, self.decode_seconds, self.encode_seconds)


def _received(payload: npt.NDArray[np.uint8], dtype: torch.dtype, *seconds: float | None) -> EncodedMedia:
    # A copy: read in place, the sender's message would stay in Ray's store for as long as a cache has the tokens.
    return EncodedMedia(torch.from_numpy(payload.copy()).view(dtype), *seconds)


class VisualTokenSource(Protocol):
    """Who a decoder asks: a VisionEncoder in its process, or the deployment."""

    async def visual_tokens(
        self, media: MediaRef, sampling: FrameSampling, version: str, adapter: str | None = None
    ) -> EncodedMedia:
        """As `VisionEncoder.visual_tokens`."""


class VisionEncoder:
    """Pulls frames from a sampler and encodes the clips of concurrent requests together.

    Args:
        config: the server's.
        sampler: a FrameSampler in this process, or the handle of the deployment.
        model: the decoder's, where it lives in this process; None: opened here.
    """

    def __init__(
        self,
        config: ServeConfig,
        sampler: FrameSource | DeploymentHandle,
        *,
        model: ValleyForConditionalGeneration | None = None,
    ) -> None:
        say_refusals_in_a_line()
        self._model = model or open_model(config, config.encoder.device, keep="vision")
        self._processor = ValleyProcessor.from_pretrained(config.model)
        check_fit(self._model.config, self._processor)
        self._sampler = RemoteSampler(sampler) if isinstance(sampler, DeploymentHandle) else sampler
        self._config, self._version = config, config.weights_version
        self._cores: Shelf[ValleyCore] = Shelf(self._open_visual_part, config.max_adapters)
        self._cache: PullCache[torch.Tensor] = PullCache(
            config.encoder_cache_bytes, lambda features: features.nbytes, name="encoder"
        )
        self._num_encoded = 0
        self._encode.set_max_batch_size(config.encode_batch_size)
        self._encode.set_batch_wait_timeout_s(config.encode_wait_s)

    async def visual_tokens(
        self, media: MediaRef, sampling: FrameSampling, version: str, adapter: str | None = None
    ) -> EncodedMedia:
        """[P + T, D] of one clip or image, on the CPU, made by the model `version`, or by it under `adapter`.

        What the tower makes of the frames is kept: an adapter's tokens cost its own projector alone.

        Raises what the sampler raises; UnavailableError for another version.
        """
        check_version(version, self._config.version_of(adapter))
        decode_seconds: float | None = None
        encode_seconds: float | None = None

        async def pull() -> torch.Tensor:
            nonlocal decode_seconds, encode_seconds
            sampled = await self._sampler.frames(media, sampling, self._version)
            began = time.monotonic()
            features: torch.Tensor = await self._encode(sampled.frames)
            decode_seconds, encode_seconds = sampled.decode_seconds, time.monotonic() - began
            metrics.STAGE_SECONDS.observe(encode_seconds, stage="encode")
            return features

        features = await self._cache.get(f"{media.key}|{media.kind}|{sampling.key}|{self._version}", pull)
        if adapter is None:
            tokens = await asyncio.to_thread(_visual_tokens, self._model.core, features)
        else:
            async with self._cores.use(adapter) as core:
                tokens = await asyncio.to_thread(_visual_tokens, core, features)
        return EncodedMedia(tokens, decode_seconds, encode_seconds)

    @serve.batch
    async def _encode(self, clips: list[Frames]) -> list[torch.Tensor]:
        self._num_encoded += len(clips)
        features = await asyncio.to_thread(encode_features, self._model, self._processor, clips)
        return [one.cpu() for one in features]

    def _open_visual_part(self, adapter: str) -> ValleyCore:
        return open_visual_part(self._model.core, self._config.adapters[adapter])

    def stats(self) -> dict[str, int]:
        """Counts since the replica started."""
        return {
            "num_hits": self._cache.num_hits,
            "num_misses": self._cache.num_misses,
            "num_encoded": self._num_encoded,
        }

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve tells the routers of callers."""
        return {"version": self._version}


class RemoteEncoder:
    """The VisionEncoder deployment as a VisualTokenSource."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._crashes = handle, Crashes()

    async def visual_tokens(
        self, media: MediaRef, sampling: FrameSampling, version: str, adapter: str | None = None
    ) -> EncodedMedia:
        """As `VisionEncoder.visual_tokens`; OverloadedError or UnavailableError where no replica can be asked.

        A second replica is asked where one ends over it; ReplicaCrashError where both do.
        """

        async def ask() -> EncodedMedia:
            with unwrapped():
                encoded: EncodedMedia = await self._handle.visual_tokens.remote(media, sampling, version, adapter)
            return encoded

        return await ask_twice(self._crashes, media.key, ask)


@torch.inference_mode()
def _visual_tokens(core: ValleyCore, features: torch.Tensor) -> torch.Tensor:
    return core.visual_tokens(features.to(core.mm_projector.weight.device)).cpu()


def open_model(
    config: ServeConfig, device: str, *, keep: Literal["all", "vision", "language"]
) -> ValleyForConditionalGeneration:
    """The served model, or the half that a replica of a split server needs; raises CheckpointError."""
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    return load_model(config.model, device=device, dtype=dtype, allow_bin=config.allow_bin, keep=keep)
