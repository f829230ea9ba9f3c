"""Assistant: questions about videos and images become answers, in one process: processor + model + engine.

It is the oracle that the server is tested against; its own oracle is Hugging Face `generate`. Knows no Ray.
T frames, P patch tokens, D hidden width of the language model.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from valley_ray.answering import (
    TextStream,
    build_prompt,
    check_fit,
    complete_params,
    encode_visual_tokens,
    load_model,
)
from valley_ray.chat.conversation import Conversation, MediaPart, from_openai
from valley_ray.engine.engine import FinishReason, Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.errors import ValleyError
from valley_ray.fetch import FetchPolicy, fetch, media_key
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox, SandboxLimits
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor

_NUM_KEPT_MEDIA = 64
"""Visual tokens kept for further questions about the same media."""


@dataclass(frozen=True)
class AskInput:
    """One question, with at most one video and one image; paths, or locators that `fetch` knows (data: URIs)."""

    question: str
    video: str | Path | None = None
    image: str | Path | None = None
    sampling: FrameSampling | None = None
    """None: the processor's own."""
    params: SamplingParams | None = None
    """None: greedy, up to 128 tokens or as many as fit. Without stop tokens it stops at the model's."""
    system_prompt: str | None = None
    """None: the processor's own."""

    def conversation(self) -> tuple[Conversation, list[MediaPart]]:
        """Media first, then the question: the same turns as an OpenAI request of these parts gives."""
        parts: list[dict[str, Any]] = []
        if self.video is not None:
            parts.append({"type": "video_url", "video_url": {"url": str(self.video)}})
        if self.image is not None:
            parts.append({"type": "image_url", "image_url": {"url": str(self.image)}})
        parts.append({"type": "text", "text": self.question})
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return from_openai([*system, {"role": "user", "content": parts}])


@dataclass(frozen=True)
class Answer:
    """What came of one question."""

    text: str
    token_ids: tuple[int, ...]
    """New tokens as the engine chose them, the stop token included."""
    finish_reason: FinishReason | None
    """None where `error` is set."""
    num_prompt_tokens: int = 0
    error: ValleyError | None = None
    """Why there is no answer; set only by `answer_batch`, where one bad file must not cost the others."""


class Assistant:
    """One model in this process. Use as a context manager, or call `close`: decoding runs in a child process."""

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        processor: ValleyProcessor,
        *,
        num_slots: int = 16,
        policy: FetchPolicy | None = None,
        sandbox_limits: SandboxLimits | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self._engine = SlotEngine(model.core, num_slots=num_slots, max_length=processor.max_length)
        self._num_slots = num_slots
        self._policy = policy or FetchPolicy()
        self._sandbox_limits = sandbox_limits or SandboxLimits()
        self._sandbox: Sandbox | None = None
        self._visual_tokens: OrderedDict[tuple[str, ...], torch.Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        num_slots: int = 16,
        policy: FetchPolicy | None = None,
        sandbox_limits: SandboxLimits | None = None,
    ) -> Self:
        """Open a model folder; `dtype` None means float32 on a CPU and the folder's own elsewhere.

        Raises CheckpointError where the folder cannot be opened.
        """
        model = load_model(folder, device=device, dtype=dtype)
        processor = ValleyProcessor.from_pretrained(folder)
        check_fit(model.config, processor)
        return cls(model, processor, num_slots=num_slots, policy=policy, sandbox_limits=sandbox_limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding child, where one was started."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def ask(
        self,
        question: str,
        *,
        video: str | Path | None = None,
        image: str | Path | None = None,
        sampling: FrameSampling | None = None,
        params: SamplingParams | None = None,
        system_prompt: str | None = None,
    ) -> Answer:
        """Answer one question; raises the ValleyError that names what is wrong with media or question."""
        [answer] = self.answer_batch([AskInput(question, video, image, sampling, params, system_prompt)])
        if answer.error is not None:
            raise answer.error
        return answer

    def stream(
        self,
        question: str,
        *,
        video: str | Path | None = None,
        image: str | Path | None = None,
        sampling: FrameSampling | None = None,
        params: SamplingParams | None = None,
        system_prompt: str | None = None,
    ) -> Iterator[str]:
        """Text deltas of one answer; joined they are `ask(...).text`. Errors come before the first delta."""
        prompt, params = self._prepare(AskInput(question, video, image, sampling, params, system_prompt))
        text = TextStream(self.processor.decode, params.stop_token_ids)
        request_id = self._engine.add(prompt, params)
        return self._deltas(request_id, text)

    def answer_batch(self, inputs: Iterable[AskInput]) -> list[Answer]:
        """Answer many questions with continuous batching; one `Answer` per input, in order.

        Inputs are read, decoded and encoded as slots come free, so a long iterable costs no memory; media that come
        again soon are decoded and encoded once. A bad input becomes an Answer with `error`.
        """
        is_idle = self._engine.num_unfinished == 0
        assert is_idle, "a stream of this assistant is still open: read or close it first"
        answers: list[Answer | None] = []
        running: dict[str, _Running] = {}
        for ask in inputs:
            answers.append(None)
            try:
                prompt, params = self._prepare(ask)
                running[self._engine.add(prompt, params)] = _Running(len(answers) - 1, prompt, params, [])
            except ValleyError as error:
                answers[-1] = Answer("", (), None, error=error)
            while self._engine.num_unfinished >= self._num_slots:
                self._advance(running, answers)
        while self._engine.num_unfinished:
            self._advance(running, answers)
        return [answer for answer in answers if answer is not None]

    def _advance(self, running: "dict[str, _Running]", answers: list[Answer | None]) -> None:
        for event in self._engine.step():
            one = running[event.request_id]
            one.token_ids.append(event.token_id)
            if event.finish_reason is not None:
                shown = [token for token in one.token_ids if token not in one.params.stop_token_ids]
                answers[one.place] = Answer(
                    self.processor.decode(shown),
                    tuple(one.token_ids),
                    event.finish_reason,
                    num_prompt_tokens=len(one.prompt.input_ids),
                )
                del running[event.request_id]

    def _deltas(self, request_id: str, text: TextStream) -> Iterator[str]:
        try:
            while self._engine.num_unfinished:
                for event in self._engine.step():
                    if event.request_id == request_id and (delta := text.push(event)):
                        yield delta
        finally:
            self._engine.abort(request_id)

    def _prepare(self, ask: AskInput) -> tuple[Prompt, SamplingParams]:
        conversation, media = ask.conversation()
        prompt = build_prompt(self.processor, conversation, [self._look_at(part, ask.sampling) for part in media])
        fit_into = self._engine.max_length if ask.params is None else None
        return prompt, complete_params(self.processor, ask.params or SamplingParams(), prompt, fit_into=fit_into)

    def _look_at(self, part: MediaPart, sampling: FrameSampling | None) -> torch.Tensor:
        """[P + T, D] of one video or image, kept for the next question about it."""
        fetched = fetch(part.url, self._policy)
        sampling, crop = self.processor.config.media_plan(part.kind, sampling)
        key = (media_key(fetched), part.kind, sampling.key)
        if key not in self._visual_tokens:
            if self._sandbox is None:
                self._sandbox = Sandbox(limits=self._sandbox_limits)
            frames = self._sandbox.frames(fetched.source, sampling, crop=crop, name=fetched.name)
            self._visual_tokens[key] = encode_visual_tokens(self.model, self.processor, [frames.frames_THWC])[0]
            if len(self._visual_tokens) > _NUM_KEPT_MEDIA:
                self._visual_tokens.popitem(last=False)
        self._visual_tokens.move_to_end(key)
        return self._visual_tokens[key]


@dataclass(frozen=True)
class _Running:
    place: int
    prompt: Prompt
    params: SamplingParams
    token_ids: list[int]
