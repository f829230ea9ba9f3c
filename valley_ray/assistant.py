"""Assistant: questions about videos and images become answers, in one process: processor + model + engine.

    with Assistant.from_pretrained("path/to/model") as assistant:
        print(assistant.ask("What is moving?", video="clip.mp4").text)

It is the oracle that the server is tested against; its own oracle is Hugging Face `generate`. Knows no Ray.
T frames, P patch tokens, D hidden width of the language model.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from valley_ray.answering import (
    TextStream,
    build_prompt,
    check_fit,
    complete_params,
    load_model,
    open_text_stream,
)
from valley_ray.chat.conversation import Conversation, MediaPart, from_openai
from valley_ray.engine.engine import FinishReason, Prompt, SamplingParams
from valley_ray.engine.open import EngineKind, VllmSettings, check_engine, open_engine
from valley_ray.errors import ConversationError, ValleyError
from valley_ray.fetch import FetchPolicy
from valley_ray.looking import Eyes
from valley_ray.media.decode import Backend
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import SandboxLimits
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor

Locator = str | Path
"""A path, or what else `fetch` knows (data: URIs)."""
Question = str | Sequence[Mapping[str, Any]]
"""A text, or OpenAI-style messages that bring history, media and system prompt (`chat.conversation.from_openai`)."""


@dataclass(frozen=True)
class AskInput:
    """One question, with any number of videos and images; or a whole conversation as messages."""

    question: Question
    video: Locator | Sequence[Locator] | None = None
    """One video or several, in the order in which the question names them; they come before images."""
    image: Locator | Sequence[Locator] | None = None
    """The same for images."""
    sampling: FrameSampling | None = None
    """None: the processor's own."""
    params: SamplingParams | None = None
    """None: greedy, up to 128 tokens or as many as fit. Without stop tokens it stops at the model's."""
    system_prompt: str | None = None
    """None: the processor's own."""
    stop: str | Sequence[str] = ()
    """Text or texts that end the answer, beside the processor's own; they are no part of it."""

    def conversation(self) -> tuple[Conversation, list[MediaPart]]:
        """Media first, then the question: the same turns as an OpenAI request of these parts gives.

        Raises ConversationError as `from_openai`, or where media or a system prompt are named beside messages.
        """
        if not isinstance(self.question, str):
            if (self.video, self.image, self.system_prompt) != (None, None, None):
                raise ConversationError(
                    "messages bring their own media and system prompt, but video, image or system_prompt came beside "
                    "them; put a video_url or image_url part or a system message into the messages"
                )
            return from_openai(self.question)
        parts: list[dict[str, Any]] = []
        for kind, given in (("video_url", self.video), ("image_url", self.image)):
            locators = [given] if isinstance(given, str | Path) else given or []
            parts += [{"type": kind, kind: {"url": str(locator)}} for locator in locators]
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
    """One model in this process. Use as a context manager, or call `close`: decoding runs in a child process.

    An engine that is not the house's own runs in another.
    """

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        processor: ValleyProcessor,
        *,
        num_slots: int = 16,
        policy: FetchPolicy | None = None,
        sandbox_limits: SandboxLimits | None = None,
        decoder: Backend = "pyav",
        engine: EngineKind = "slots",
        vllm: VllmSettings | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self._engine = open_engine(
            engine, model.core, num_slots=num_slots, max_length=processor.max_length, vllm=vllm, keep_weights=False
        )
        self._num_slots = num_slots
        self._eyes = Eyes(model, processor, policy=policy, sandbox_limits=sandbox_limits, decoder=decoder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        settings: Mapping[str, Any] | None = None,
        splice: str | None = None,
        base: str | Path | None = None,
        num_slots: int = 16,
        policy: FetchPolicy | None = None,
        sandbox_limits: SandboxLimits | None = None,
        decoder: Backend = "pyav",
        engine: EngineKind = "slots",
        vllm: VllmSettings | None = None,
    ) -> Self:
        """Open a model folder, one of upstream's released layout included.

        Args:
            folder: what `valley_ray.convert` or training wrote, or upstream released.
            device: where the model runs, as torch names it.
            dtype: None means float32 on a CPU and the folder's own elsewhere.
            settings: fields of ProcessorConfig to change, for example ``{"prompt_style": "upstream-serve"}``.
            splice: replaces the model's rule of how visual tokens meet placeholders; see model/splice.py.
            base: folder under a LoRA folder, where the one that it names is out of reach.
            num_slots: questions that are answered at once.
            policy: what may be read; None means local files and data: URIs.
            sandbox_limits: time and memory that decoding one file may take.
            decoder: reader of videos; "decord" gives upstream's pixels, with its faults.
            engine: what makes the tokens; "vllm" is an extra, and leaves `model` without a language model.
            vllm: settings of that engine.

        Raises:
            CheckpointError: the folder cannot be opened.
            ConfigError: a setting that there is not, or an engine that is not installed.
        """
        check_engine(engine)
        model = load_model(folder, device=device, dtype=dtype, splice=splice, base=base)
        processor = ValleyProcessor.from_pretrained(folder if base is None else base, settings=settings)
        check_fit(model.config, processor)
        return cls(
            model,
            processor,
            num_slots=num_slots,
            policy=policy,
            sandbox_limits=sandbox_limits,
            decoder=decoder,
            engine=engine,
            vllm=vllm,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding child, where one was started, and the engine's process, where it has one."""
        self._eyes.close()
        self._engine.close()

    def ask(
        self,
        question: Question,
        *,
        video: Locator | Sequence[Locator] | None = None,
        image: Locator | Sequence[Locator] | None = None,
        sampling: FrameSampling | None = None,
        params: SamplingParams | None = None,
        system_prompt: str | None = None,
        stop: str | Sequence[str] = (),
    ) -> Answer:
        """Answer one question, or the last of OpenAI-style messages.

        Raises the ValleyError that names what is wrong with media or question.
        """
        [answer] = self.answer_batch([AskInput(question, video, image, sampling, params, system_prompt, stop)])
        if answer.error is not None:
            raise answer.error
        return answer

    def stream(
        self,
        question: Question,
        *,
        video: Locator | Sequence[Locator] | None = None,
        image: Locator | Sequence[Locator] | None = None,
        sampling: FrameSampling | None = None,
        params: SamplingParams | None = None,
        system_prompt: str | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Text deltas of one answer; joined they are `ask(...).text`. Errors come before the first delta."""
        prompt, params = self._prepare(AskInput(question, video, image, sampling, params, system_prompt, stop))
        text = open_text_stream(self.processor, params, stop)
        request_id = self._engine.add(prompt, params)
        deltas = self._deltas(request_id, text)
        # A generator that was never begun runs no `finally`: without this its request would wait for ever.
        weakref.finalize(deltas, self._engine.abort, request_id).atexit = False
        return deltas

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
                text = open_text_stream(self.processor, params, ask.stop)
                running[self._engine.add(prompt, params)] = _Running(len(answers) - 1, prompt, text, [])
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
            one.text.push(event)
            if event.finish_reason is None and not one.text.stopped:
                continue
            self._engine.abort(event.request_id)
            reason: FinishReason | None = "stop" if one.text.stopped else event.finish_reason
            num_prompt_tokens = len(one.prompt.input_ids)
            answers[one.place] = Answer(one.text.text, tuple(one.token_ids), reason, num_prompt_tokens)
            del running[event.request_id]

    def _deltas(self, request_id: str, text: TextStream) -> Iterator[str]:
        try:
            while self._engine.num_unfinished:
                for event in self._engine.step():
                    if event.request_id != request_id:
                        continue
                    if delta := text.push(event):
                        yield delta
                    if text.stopped:
                        return
        finally:
            self._engine.abort(request_id)

    def _prepare(self, ask: AskInput) -> tuple[Prompt, SamplingParams]:
        conversation, media = ask.conversation()
        prompt = build_prompt(self.processor, conversation, [self._eyes.look_at(part, ask.sampling) for part in media])
        fit_into = self._engine.max_length if ask.params is None else None
        return prompt, complete_params(self.processor, ask.params or SamplingParams(), prompt, fit_into=fit_into)


@dataclass(frozen=True)
class _Running:
    place: int
    prompt: Prompt
    text: TextStream
    token_ids: list[int]
