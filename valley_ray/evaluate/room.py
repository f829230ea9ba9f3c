"""One model answering many questions about decoded clips: the engine room of batch answers. Knows no Ray and no files
of media. T frames, S crop side, P patch tokens, D hidden width of the language model.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from valley_ray.answering import (
    TextStream,
    build_prompt,
    check_fit,
    complete_params,
    encode_visual_tokens,
    load_model,
    open_text_stream,
)
from valley_ray.chat.conversation import Conversation
from valley_ray.engine.engine import FinishReason, Prompt, SamplingParams
from valley_ray.engine.open import open_engine
from valley_ray.errors import ValleyError
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor

_NUM_KEPT_CLIPS = 64
"""Clips whose visual tokens are kept: questions about one clip follow each other."""
_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ClipPlace = tuple[str, int]
"""Shard and row of a decoded clip."""
Frames = Callable[[str, int], npt.NDArray[np.uint8]]
"""(shard, row) → uint8 [T, S, S, 3]"""


@dataclass(frozen=True)
class Asked:
    """One question: its last message is to be answered."""

    key: str
    """Names it among the others; random answers depend on it and on the seed, not on the order."""
    conversation: Conversation
    clips: tuple[ClipPlace, ...]
    """One per mark of the conversation, in order."""


@dataclass(frozen=True)
class Answered:
    """What came of one question: an answer, or the reason why there is none."""

    key: str
    text: str = ""
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    """The stop token included."""
    error: ValleyError | None = None


class AnswerRoom:
    """Model, processor and engine of one process. Greedy answers are those of `Assistant.ask`."""

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        processor: ValleyProcessor,
        frames: Frames,
        settings: AnswerSettings,
    ) -> None:
        self._model, self._processor, self._frames = model.eval(), processor, frames
        self._engine = open_engine(
            settings.engine,
            model.core,
            num_slots=settings.num_slots,
            max_length=processor.max_length,
            keep_weights=False,
        )
        self._settings = settings
        self._visual_tokens: OrderedDict[ClipPlace, torch.Tensor] = OrderedDict()

    @classmethod
    def open(cls, folder: Path, frames: Frames, settings: AnswerSettings, *, device: str) -> "AnswerRoom":
        """Open a model folder.

        Raises:
            CheckpointError: the folder cannot be opened, or its processor does not fit.
            ConfigError: the engine cannot run the model.
        """
        model = load_model(folder, device=device, dtype=_DTYPES[settings.precision])
        processor = ValleyProcessor.from_pretrained(folder)
        check_fit(model.config, processor)
        return cls(model, processor, frames, settings)

    def answers(self, asked: Iterable[Asked], *, num_at_once: int | None = None) -> Iterator[Answered]:
        """Answer with continuous batching, each yielded as soon as it is there: one per question, in no order.

        Questions are taken as slots come free, so that memory holds `num_slots` prompts and a few clips. What is wrong
        with one question fails that one alone. `num_at_once` lowers the number of slots.
        """
        limit = min(self._settings.num_slots, num_at_once or self._settings.num_slots)
        running: dict[str, _Running] = {}
        try:
            for one in asked:
                try:
                    begun = self._begin(one)
                    running[begun.request_id] = begun
                except ValleyError as error:
                    yield Answered(one.key, error=error)
                while self._engine.num_unfinished >= limit:
                    yield from self._step(running)
            while self._engine.num_unfinished:
                yield from self._step(running)
        finally:
            for request_id in running:
                self._engine.abort(request_id)

    def _begin(self, asked: Asked) -> "_Running":
        visual_tokens = [self._look_at(place) for place in asked.clips]
        prompt = build_prompt(self._processor, asked.conversation, visual_tokens)
        params = complete_params(self._processor, self._params(asked.key), prompt, fit_into=self._engine.max_length)
        text = open_text_stream(self._processor, params)
        return _Running(self._engine.add(prompt, params), asked.key, prompt, text)

    def _step(self, running: "dict[str, _Running]") -> Iterator[Answered]:
        for event in self._engine.step():
            one = running[event.request_id]
            one.num_new_tokens += 1
            one.text.push(event)
            if event.finish_reason is None and not one.text.stopped:
                continue
            self._engine.abort(event.request_id)
            del running[event.request_id]
            reason: FinishReason | None = "stop" if one.text.stopped else event.finish_reason
            yield Answered(one.key, one.text.text, reason, len(one.prompt.input_ids), one.num_new_tokens)

    def _params(self, key: str) -> SamplingParams:
        settings = self._settings
        own = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")
        return SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed + (own << 32),
        )

    def _look_at(self, place: ClipPlace) -> torch.Tensor:
        """[P + T, D] of a clip. One clip per pass of the tower, as the assistant does: batches round differently."""
        if place not in self._visual_tokens:
            self._visual_tokens[place] = encode_visual_tokens(self._model, self._processor, [self._frames(*place)])[0]
            if len(self._visual_tokens) > _NUM_KEPT_CLIPS:
                self._visual_tokens.popitem(last=False)
        self._visual_tokens.move_to_end(place)
        return self._visual_tokens[place]


@dataclass
class _Running:
    request_id: str
    key: str
    prompt: Prompt
    text: TextStream
    num_new_tokens: int = 0
