"""VllmEngine: the Engine interface over vLLM, which gets prompts as embeddings.

Embedding table and splice are ours, as for slots: vLLM sees [L, D] per prompt, and its prefix cache finds prompts that
begin with the same whole blocks of embeddings. The tokens of an answer are not found again: a later prompt brings them
as embeddings, which vLLM compares with embeddings only. Greedy tokens equal Hugging Face `generate` in float32, where
the top logit leads by more than 1e-4; other choices are the house's own (`vllm_sampling`), so that a seed gives the
same tokens from either engine. vLLM computes in another process: `step` hands out what has come from there. Not
thread-safe: one thread steps, adds and aborts. vLLM is imported when an engine is made.
L prompt tokens, D hidden width.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from transformers.modeling_utils import PreTrainedModel

from valley_ray.engine.admission import check_fits, check_max_length
from valley_ray.engine.engine import FinishReason, Prompt, SamplingParams, TokenEvent
from valley_ray.engine.open import VllmSettings
from valley_ray.engine.slots import LanguageCore
from valley_ray.engine.vllm_arguments import engine_arguments
from valley_ray.engine.vllm_loop import VllmLoop
from valley_ray.errors import ConfigError, UnavailableError
from valley_ray.model.language_folder import write_language_model

_PATIENCE_S = 0.02
"""Longest wait of a step: whoever steps has requests to add and abort between steps."""


@dataclass(eq=False)
class _Request:
    """One request that has not ended."""

    request_id: str
    prompt_length: int
    params: SamplingParams
    reader: "Future[None]"
    events: deque[TokenEvent] = field(default_factory=deque)
    """Come and not handed out."""
    num_tokens: int = 0
    """Of the answer, that have come or were there before."""
    is_computed: bool = False
    """Whether the first new token has come."""

    def receive(self, output: Any) -> None:
        """A RequestOutput with new tokens, one or more."""
        [completion] = output.outputs
        tokens = list(completion.token_ids)
        reason: FinishReason | None = completion.finish_reason
        assert reason in (None, "stop", "length"), f"vLLM ended a request with {reason!r}"
        assert tokens or reason is None, "a request ends with a token"
        logprobs = completion.logprobs or [None] * len(tokens)
        for place, (token, chances) in enumerate(zip(tokens, logprobs, strict=True)):
            logprob, top = _logprobs(chances, token, self.params.logprobs)
            last = reason if place + 1 == len(tokens) else None
            cached = output.num_cached_tokens or 0
            self.events.append(TokenEvent(self.request_id, token, self.num_tokens, last, logprob, top, cached))
            self.num_tokens += 1


class VllmEngine:
    """At most `num_slots` requests run at once, the others wait in order of arrival."""

    def __init__(
        self,
        core: LanguageCore,
        *,
        num_slots: int = 16,
        max_length: int = 2048,
        settings: VllmSettings | None = None,
        keep_weights: bool = True,
    ) -> None:
        """Writes the language model into a temporary folder ($TMPDIR needs room for its weights) and starts vLLM on it.

        That takes from twenty seconds to minutes. A core that is merged or trained afterwards needs a new engine.

        Args:
            core: the model; vLLM has weights of its own, on the device that it was built for.
            num_slots: requests that run at once.
            max_length: tokens of one request, prompt and answer together.
            settings: of vLLM.
            keep_weights: False drops the language model's weights here, beside the input embeddings, before vLLM
                reads its own.

        Raises:
            ConfigError: vLLM cannot serve the model, or a number is out of range.
        """
        model = core.language_model
        config: Any = model.config.get_text_config(decoder=True)
        check_max_length(config, max_length)
        if num_slots < 1:
            raise ConfigError(f"expected at least one slot, got {num_slots=}")
        self.max_length = max_length
        self._core, self._num_slots, self._vocab_size = core, num_slots, int(config.vocab_size)
        self._embed_tokens = model.get_input_embeddings()
        self._device, self._dtype = self._embed_tokens.weight.device, self._embed_tokens.weight.dtype
        with TemporaryDirectory(prefix="valley-vllm-") as folder:
            arguments = engine_arguments(Path(folder), model, settings or VllmSettings(), num_slots, max_length)
            write_language_model(model, Path(folder))
            if not keep_weights:
                _drop_weights(model)
            self._vllm = VllmLoop(arguments)
        self._requests: dict[str, _Request] = {}
        self.num_prompt_tokens = 0
        """Prompt tokens of all requests that have a first token."""
        self.num_cached_tokens = 0
        """Those among them that were found in the cache."""

    @property
    def num_unfinished(self) -> int:
        """Requests that have not had their last event."""
        return len(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that can hold a place: vLLM does not tell which ones do."""
        return min(self._num_slots, len(self._requests))

    @torch.inference_mode()
    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Embed a prompt and hand it to vLLM.

        Raises PromptTooLongError where prompt + max_tokens exceed `max_length`, ConfigError for a prompt with an
        adapter, and what the core's `embed` raises where visual tokens and placeholders differ.
        """
        check_fits(prompt, params, self.max_length)
        if prompt.adapter is not None:
            raise ConfigError(
                "the vllm engine serves no adapters; merge it (valley-ray merge-lora) or use engine slots"
            )
        request_id = request_id or uuid4().hex
        assert request_id not in self._requests, f"{request_id=} is already in use"
        input_ids = torch.tensor(prompt.input_ids, dtype=torch.int64, device=self._device)
        visual = [tokens.to(self._device, self._dtype) for tokens in prompt.visual_tokens]
        embeds = self._core.embed(input_ids, visual)
        if prompt.answered:
            answered = torch.tensor(prompt.answered, dtype=torch.int64, device=self._device)
            embeds = torch.cat([embeds, self._embed_tokens(answered)])
        reader = self._vllm.ask(request_id, embeds.cpu(), _sampling_params(params, prompt.answered))
        num_prompt_tokens, num_answered = len(embeds), len(prompt.answered)
        self._requests[request_id] = _Request(request_id, num_prompt_tokens, params, reader, num_tokens=num_answered)
        return request_id

    def abort(self, request_id: str) -> None:
        """Free the request's place; no further event comes. An unknown or finished id is ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._vllm.abort(request.reader)

    def step(self) -> list[TokenEvent]:
        """At most one token of every request, as many as have come; waits a moment where none has.

        Raises UnavailableError where vLLM's process died: the engine is then of no more use.
        """
        if not self._requests:
            return []
        self._take(wait=not any(one.events for one in self._requests.values()))
        events = [one.events.popleft() for one in self._requests.values() if one.events]
        for event in events:
            if event.finish_reason is not None:
                del self._requests[event.request_id]
        return events

    def forget_prompts(self) -> None:
        """Empty the cache of prompts; no request may be unfinished."""
        self._vllm.forget_prompts()

    def close(self) -> None:
        """End vLLM's process."""
        self._vllm.close()

    def _take(self, *, wait: bool) -> None:
        """Hand what has come to its requests; what comes for an aborted one is dropped."""
        arrived = list(self._vllm.arrived(_PATIENCE_S if wait else 0.0))
        if wait and not arrived and self._vllm.has_failed:
            raise UnavailableError("vLLM's process has ended; its log says why")
        for request_id, output in arrived:
            request = self._requests.get(request_id)
            if request is None:
                continue
            if isinstance(output, BaseException):
                reason = " ".join(str(output).split()) or type(output).__name__
                raise UnavailableError(f"vLLM failed ({reason[:300]}); its log says why") from output
            if not request.is_computed:
                request.is_computed = True
                self.num_prompt_tokens += request.prompt_length
                self.num_cached_tokens += output.num_cached_tokens or 0
            request.receive(output)


def _sampling_params(params: SamplingParams, answered: Sequence[int]) -> Any:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    from valley_ray.engine.vllm_sampling import extra_args

    return VllmSamplingParams(
        max_tokens=params.max_tokens - len(answered),
        temperature=0.0,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=True,
        logprobs=params.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args(params, answered),
    )


def _logprobs(chances: Any, token: int, count: int | None) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """vLLM's {token id: Logprob} at one position → that of the chosen token, and the `count` likeliest."""
    if chances is None or count is None:
        return None, ()
    # The chosen token is among them whatever its rank.
    ranked = sorted(chances.items(), key=lambda item: item[1].rank)[:count]
    return chances[token].logprob, tuple((other, chance.logprob) for other, chance in ranked)


def _drop_weights(model: PreTrainedModel) -> None:
    """Move everything but the input embeddings to the meta device."""
    table = model.get_input_embeddings().weight
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is not table:
                setattr(module, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
    if table.is_cuda:
        torch.cuda.empty_cache()
