"""What the way from decoder to sampler and back costs when nobody works: both hops, with what really crosses them.

Three deployments of the sizes that the server's have, with its router and its handles between them. One pull sends a
MediaRef and a FrameSampling down both hops; frames of eight times 224 x 224 come back over the first, visual tokens as
Valley-7B's (264 x 4096, bfloat16) over the second. The time of a pull, seen from the decoder, is what both hops cost.

    python -m valley_ray.benchmarks.serve.hops NUM_PULLS
"""

import logging
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from valley_ray.benchmarks.serve.child import Starter
from valley_ray.benchmarks.serve.server import start_ray
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.encoder import EncodedMedia, RemoteEncoder
from valley_ray.serve.protocol import MediaRef
from valley_ray.serve.router import MediaRouter
from valley_ray.serve.sampler import RemoteSampler, SampledFrames

_FRAMES = (8, 224, 224, 3)
_TOKENS = (264, 4096)
_NUM_WARM = 10


class IdleSampler:
    """Has the frames of every video already."""

    def __init__(self) -> None:
        self._frames = SampledFrames(np.zeros(_FRAMES, np.uint8))

    async def frames(self, media: MediaRef, sampling: FrameSampling, version: str) -> SampledFrames:
        """uint8 [T, S, S, 3]."""
        return self._frames


class IdleEncoder:
    """Pulls frames and has their visual tokens already."""

    def __init__(self, sampler: DeploymentHandle) -> None:
        self._sampler = RemoteSampler(sampler)
        self._encoded = EncodedMedia(torch.zeros(_TOKENS, dtype=torch.bfloat16))

    async def visual_tokens(
        self, media: MediaRef, sampling: FrameSampling, version: str, adapter: str | None = None
    ) -> EncodedMedia:
        """[P + T, D]."""
        await self._sampler.frames(media, sampling, version)
        return self._encoded


class IdleDecoder:
    """Pulls visual tokens, one video after the other."""

    def __init__(self, encoder: DeploymentHandle) -> None:
        self._encoder = RemoteEncoder(encoder)

    async def pull(self, count: int) -> list[float]:
        """Milliseconds of each of `count` pulls, every one of another video."""
        took = []
        for number in range(count):
            media = MediaRef(f"bytes-{number}", "video", "clip.mp4", path=f"/clips/{number}.mp4")
            start = time.perf_counter()
            await self._encoder.visual_tokens(media, FrameSampling(), "")
            took.append(1000 * (time.perf_counter() - start))
        return took


def hop_numbers(num_pulls: int) -> dict[str, Any]:
    """`hop_ms_p50` and the 95th percentile beside it, on a Ray of its own."""
    config = ServeConfig()

    def deployment(kind: type[Any], size: str) -> serve.Deployment:
        router = {"request_router_class": MediaRouter}
        return serve.deployment(kind, **getattr(config, size).options(kind.__name__, router=router))

    sampler = deployment(IdleSampler, "sampler").bind()
    encoder = deployment(IdleEncoder, "encoder").bind(sampler)
    app = deployment(IdleDecoder, "decoder").bind(encoder)
    start_ray()
    try:
        decoder = serve.run(app, name="hops", route_prefix=None)
        decoder.pull.remote(_NUM_WARM).result()
        took: list[float] = decoder.pull.remote(num_pulls).result()
    finally:
        serve.shutdown()
        ray.shutdown()
    return {"hop_ms_p50": round(median(took), 2), "hop_ms_p95": round(float(np.percentile(took, 95)), 2)}


def main(num_pulls: str) -> None:
    """Measure at once; whoever started this process asks for the numbers."""
    starter = Starter()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    starter.tell("no URL: nothing is served over HTTP")
    numbers = hop_numbers(int(num_pulls))
    starter.wait(lambda: numbers)


if __name__ == "__main__":
    main(sys.argv[1])
