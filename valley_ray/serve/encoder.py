"""VisionEncoder: MediaRef → visual tokens [P + T, D]; tower and projector of the model. Asked by decoders on a miss."""

import asyncio

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from valley_ray.answering import check_fit, encode_visual_tokens, load_model
from valley_ray.media.sampling import FrameSampling
from valley_ray.processor import ValleyProcessor
from valley_ray.serve.calls import PullCache, unwrapped
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.protocol import MediaRef
from valley_ray.serve.sampler import Frames


class VisionEncoder:
    """Pulls frames from a sampler and encodes the clips of concurrent requests together."""

    def __init__(self, config: ServeConfig, sampler: DeploymentHandle) -> None:
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self._model = load_model(config.model, device=config.encoder.device, dtype=dtype, allow_bin=config.allow_bin)
        # The decoders hold the language model; here it would only take memory.
        del self._model.core.language_model
        self._processor = ValleyProcessor.from_pretrained(config.model)
        check_fit(self._model.config, self._processor)
        self._sampler = sampler
        self._cache: PullCache[torch.Tensor] = PullCache(config.encoder_cache_bytes, lambda tokens: tokens.nbytes)
        self._num_encoded = 0
        self._encode.set_max_batch_size(config.encode_batch_size)
        self._encode.set_batch_wait_timeout_s(config.encode_wait_s)

    async def visual_tokens(self, media: MediaRef, sampling: FrameSampling) -> torch.Tensor:
        """[P + T, D] of one clip or image, on the CPU; raises what the sampler raises."""

        async def pull() -> torch.Tensor:
            with unwrapped():
                frames: Frames = await self._sampler.frames.remote(media, sampling)
            tokens: torch.Tensor = await self._encode(frames)
            return tokens

        return await self._cache.get(f"{media.key}|{media.kind}|{sampling.key}", pull)

    @serve.batch
    async def _encode(self, clips: list[Frames]) -> list[torch.Tensor]:
        self._num_encoded += len(clips)
        tokens = await asyncio.to_thread(encode_visual_tokens, self._model, self._processor, clips)
        return [one.cpu() for one in tokens]

    def stats(self) -> dict[str, int]:
        """Counts since the replica started."""
        return {
            "num_hits": self._cache.num_hits,
            "num_misses": self._cache.num_misses,
            "num_encoded": self._num_encoded,
        }
