"""Looking at media: a video or image → its visual tokens, in one process, kept for further questions about it.

Fetches, decodes in a child process and encodes. Knows neither prompts nor engines.
T frames, P patch tokens, D hidden width of the language model.
"""

from collections import OrderedDict
from pathlib import Path

import torch

from valley_ray.answering import encode_visual_tokens
from valley_ray.chat.conversation import MediaPart
from valley_ray.fetch import FetchPolicy, fetch, media_key
from valley_ray.media.decode import Backend
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox, SandboxLimits
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor

_NUM_KEPT_MEDIA = 64
"""Visual tokens kept for further questions about the same media."""


class Eyes:
    """The part of a model that sees. Call `close` in the end: decoding runs in a child process."""

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        processor: ValleyProcessor,
        *,
        policy: FetchPolicy | None = None,
        sandbox_limits: SandboxLimits | None = None,
        decoder: Backend = "pyav",
    ) -> None:
        """Set up; nothing is started before the first look.

        Args:
            model: its language model is not used.
            processor: of the same folder.
            policy: what may be read; None means local files and data: URIs.
            sandbox_limits: time and memory that decoding one file may take.
            decoder: reader of videos.
        """
        self._model, self._processor = model, processor
        self._policy = policy or FetchPolicy()
        self._sandbox_limits, self._decoder = sandbox_limits or SandboxLimits(), decoder
        self._sandbox: Sandbox | None = None
        self._visual_tokens: OrderedDict[tuple[str, ...], torch.Tensor] = OrderedDict()

    def look_at(self, part: MediaPart, sampling: FrameSampling | None = None) -> torch.Tensor:
        """[P + T, D] of one video or image; `sampling` None: the processor's own.

        Raises FetchError, MediaError and SamplingError subclasses that say what is wrong with it.
        """
        fetched = fetch(part.url, self._policy)
        is_folder = isinstance(fetched.source, Path) and fetched.source.is_dir()
        sampling, crop = self._processor.config.media_plan(part.kind, sampling, is_folder=is_folder)
        key = (media_key(fetched), part.kind, sampling.key)
        if key not in self._visual_tokens:
            if self._sandbox is None:
                self._sandbox = Sandbox(limits=self._sandbox_limits, backend=self._decoder)
            frames = self._sandbox.frames(fetched.source, sampling, crop=crop, name=fetched.name)
            self._visual_tokens[key] = encode_visual_tokens(self._model, self._processor, [frames.frames_THWC])[0]
            if len(self._visual_tokens) > _NUM_KEPT_MEDIA:
                self._visual_tokens.popitem(last=False)
        self._visual_tokens.move_to_end(key)
        return self._visual_tokens[key]

    def close(self) -> None:
        """End the decoding child, where one was started."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None
