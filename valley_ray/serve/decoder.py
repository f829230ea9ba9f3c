"""LanguageDecoder: AnswerRequest → text deltas; the language model behind an engine. Pulls visual tokens on a miss."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import torch
from ray.serve.handle import DeploymentHandle

from valley_ray.answering import build_prompt, check_fit, complete_params
from valley_ray.chat.conversation import Conversation
from valley_ray.engine.open import open_engine
from valley_ray.errors import PromptTooLongError
from valley_ray.processor import ValleyProcessor
from valley_ray.serve import metrics
from valley_ray.serve.answer_watch import AnswerWatch
from valley_ray.serve.calls import PullCache, check_version
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.delta_writer import DeltaWriter
from valley_ray.serve.encoder import RemoteEncoder, VisionEncoder, VisualTokenSource, open_model
from valley_ray.serve.engine_thread import EngineThread
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest, FrameWish, MediaRef
from valley_ray.serve.replica_log import say_refusals_in_a_line
from valley_ray.serve.sampler import FrameSampler
from valley_ray.serve.served_adapters import Served, ServedAdapters

_CHARACTERS_PER_TOKEN = 64
"""More than tokens of real text have; a message has at least one token."""


class LanguageDecoder:
    """Answers many requests at once; a video it has seen lately costs no encoder call.

    Args:
        config: the server's.
        encoder: the handle of the VisionEncoder deployment; None: encoder and sampler live in this process and share
            the weights (the colocated shape).
    """

    def __init__(self, config: ServeConfig, encoder: VisualTokenSource | DeploymentHandle | None = None) -> None:
        say_refusals_in_a_line()
        model = open_model(config, config.decoder.device, keep="all" if encoder is None else "language")
        processor = ValleyProcessor.from_pretrained(config.model)
        check_fit(model.config, processor)
        self._served = ServedAdapters(config, model.core, processor)
        if encoder is None:
            encoder = VisionEncoder(config, FrameSampler(config), model=model)
        self._encoder = RemoteEncoder(encoder) if isinstance(encoder, DeploymentHandle) else encoder
        self._config = config
        self._max_length = config.max_length or processor.max_length
        engine = open_engine(
            config.engine,
            model.core,
            num_slots=config.num_slots,
            max_length=self._max_length,
            vllm=config.vllm,
            keep_weights=False,
        )
        self._thread, self._num_stopped = EngineThread(engine, _tell_load), 0
        self._cache: PullCache[torch.Tensor] = PullCache(
            config.decoder_cache_bytes, lambda tokens: tokens.nbytes, name="decoder"
        )

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        """Deltas of one answer; a caller that stops reading frees the slot.

        Raises what looking at the media raises, ConversationError and PromptTooLongError; all before the first delta.
        """
        sent_at = None if request.answered else request.sent_at
        with AnswerWatch(self._config.name_under(request.adapter), sent_at) as watch:
            async with (
                self._served.use(request.adapter) as served,
                aclosing(self._deltas(request, served, watch)) as deltas,
            ):
                async for delta in deltas:
                    yield delta

    async def _deltas(
        self, request: AnswerRequest, served: Served, watch: AnswerWatch
    ) -> AsyncGenerator[AnswerDelta, None]:
        if request.answered:
            check_version(request.answered_with, served.version)
        _check_length(request.conversation, self._max_length)
        looks = zip(request.media, request.frames, strict=True)
        visual_tokens = await asyncio.gather(*(self._look_at(media, wish, served, watch) for media, wish in looks))
        if request.media:
            watch.has_media()
        processor = served.processor
        prompt = build_prompt(processor, request.conversation, visual_tokens, adapter=served.weights)
        fit_into = self._max_length if request.fit_max_tokens else None
        params = complete_params(processor, request.params, prompt, fit_into=fit_into)
        writer = DeltaWriter(
            request, processor, params, num_prompt_tokens=len(prompt.input_ids), version=served.version
        )
        watch.asks_engine()
        async with aclosing(self._thread.generate(replace(prompt, answered=request.answered), params)) as events:
            async for event in events:
                watch.token(len(prompt.input_ids), event.num_cached_tokens)
                delta = writer.push(event, watch)
                if delta is not None:
                    yield delta
                if writer.stopped:
                    self._num_stopped += event.finish_reason is None
                    break

    async def _look_at(self, media: MediaRef, wish: FrameWish, served: Served, watch: AnswerWatch) -> torch.Tensor:
        sampling = wish.over(self._config.sampling or served.processor.sampling)

        async def pull() -> torch.Tensor:
            encoded = await self._encoder.visual_tokens(media, sampling, served.version, served.adapter)
            watch.pulled(encoded.decode_seconds, encoded.encode_seconds)
            return encoded.tokens

        return await self._cache.get(f"{media.key}|{media.kind}|{sampling.key}|{served.version}", pull)

    def stats(self) -> dict[str, int]:
        """Counts since the replica started, and its process."""
        encoder = self._encoder.stats() if isinstance(self._encoder, VisionEncoder) else {}
        return {
            "process_id": os.getpid(),
            "num_hits": self._cache.num_hits,
            "num_misses": self._cache.num_misses,
            "num_unfinished": self._thread.num_unfinished,
            # A request that a stop string ended is aborted as well, and not abandoned by anybody.
            "num_abandoned": max(0, self._thread.num_abandoned - self._num_stopped),
            **self._served.stats(),
            **({"num_encoded": encoder["num_encoded"]} if encoder else {}),
        }

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve tells the routers of callers."""
        return {"version": self._config.weights_version}

    def check_health(self) -> None:
        """Serve replaces a replica whose engine broke."""
        if self._thread.broken is not None:
            raise RuntimeError("the engine broke") from self._thread.broken

    def __del__(self) -> None:
        if hasattr(self, "_thread"):  # not where opening the model failed
            self._thread.close()


def _check_length(conversation: Conversation, max_length: int) -> None:
    """Refuse what cannot fit before it is tokenized, which takes seconds for megabytes while no other answer goes on.

    Raises PromptTooLongError.
    """
    num_characters = sum(len(message.content) + _CHARACTERS_PER_TOKEN for message in conversation.messages)
    if num_characters > max_length * _CHARACTERS_PER_TOKEN:
        raise PromptTooLongError(
            f"about {num_characters} characters in {len(conversation.messages)} messages are more than "
            f"the {max_length} tokens of the model hold; shorten the conversation"
        )


def _tell_load(running: int, waiting: int) -> None:
    metrics.RUNNING_REQUESTS.set(running)
    metrics.WAITING_REQUESTS.set(waiting)
