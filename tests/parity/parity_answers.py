"""Answers by engine and text stream from stored pixels: what assistant and server do, without their decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from parity_set import ROOT

from valley_ray.answering import build_prompt, complete_params, load_model, open_text_stream
from valley_ray.chat.conversation import Conversation
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.processor import ValleyProcessor


class Answerer:
    """A checkpoint of the set behind the engine; `settings` are those of its processor."""

    def __init__(self, name: str, *, splice: str, **settings: Any) -> None:
        self.name, folder = name, ROOT / "checkpoints" / name
        self.model = load_model(folder, splice=splice)
        self.processor = ValleyProcessor.from_pretrained(folder, settings=settings)
        self._engine = SlotEngine(self.model.core, num_slots=1)

    def with_settings(self, **settings: Any) -> "Answerer":
        """The same model with other settings of its processor."""
        other = object.__new__(type(self))
        other.name, other.model, other._engine = self.name, self.model, self._engine
        config = self.processor.config.model_copy(update=settings)
        other.processor = ValleyProcessor(self.processor.tokenizer, config)
        return other

    @torch.no_grad()
    def prompt(self, conversation: Conversation, clips: Sequence[torch.Tensor]) -> Prompt:
        """The prompt about clips of pixels [T, 3, S, S]."""
        features = self.model.encode_clips(list(clips)) if clips else []
        return build_prompt(self.processor, conversation, [self.model.core.visual_tokens(one) for one in features])

    def answer(self, prompt: Prompt, *, max_tokens: int, stop: Sequence[str] = ()) -> tuple[list[int], str]:
        """New tokens and text of a greedy answer."""
        params = complete_params(self.processor, SamplingParams(max_tokens=max_tokens), prompt, fit_into=None)
        stream, token_ids, text = open_text_stream(self.processor, params, stop), [], ""
        request_id = self._engine.add(prompt, params)
        while self._engine.num_unfinished:
            for event in self._engine.step():
                token_ids.append(event.token_id)
                text += stream.push(event)
                if stream.stopped:
                    self._engine.abort(request_id)
        return token_ids, text
