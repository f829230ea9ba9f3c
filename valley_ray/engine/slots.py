"""SlotEngine: continuous batching over a preallocated KV cache, for Hugging Face causal LMs.

Requests join and leave between steps. One step is one forward pass over the newest token of every running request and
the next chunks of the prompts in line, laid end to end: a long prompt is computed piece by piece while streams go on.
A prompt that begins like one whose keys and values are in the cache, running or finished, takes them over. Greedy
tokens equal Hugging Face `generate` (float32, where the top logit leads by more than 1e-4): the batch changes float
rounding and nothing else. Not thread-safe: one thread steps, adds and aborts.
n running requests, N new tokens of a pass, L prompt tokens, D hidden width, M maximum length, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol
from uuid import uuid4

import torch
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.modeling_utils import PreTrainedModel

from valley_ray.engine.adapters import Adapter, PassAdapters
from valley_ray.engine.admission import check_fits, check_max_length
from valley_ray.engine.attention import Chunk, SlotPass
from valley_ray.engine.cache import SlotCache
from valley_ray.engine.engine import FinishReason, Prompt, SamplingParams, TokenEvent
from valley_ray.engine.memory import keep_freed
from valley_ray.engine.prefix import ContentKeys, Keys
from valley_ray.engine.rows import Request, Rows
from valley_ray.engine.sampling import choose_tokens, logprobs_of
from valley_ray.engine.shadow import shadow
from valley_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = {"cpu": 512}
_PREFILL_TOKENS_ELSEWHERE = 4096


class LanguageCore(Protocol):
    """What the engine needs of a model: a causal LM, and prompts as embeddings (`valley_ray.model` has one)."""

    @property
    def language_model(self) -> PreTrainedModel:
        """A causal LM that takes its attention function from transformers' table."""

    def embed(self, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """int64 [L] and one [P + T, D] per visual block → [L, D]."""


class SlotEngine:
    """The default Engine: at most `num_slots` requests run at once, the others wait in order of arrival."""

    def __init__(
        self,
        core: LanguageCore,
        *,
        num_slots: int = 16,
        max_length: int = 2048,
        max_prefill_tokens: int | None = None,
        num_kept_prompts: int = 0,
        pack_weights: bool | None = None,
    ) -> None:
        """Reads the weights now: a model that is moved, merged or trained afterwards needs a new engine.

        Allocates keys and values for (num_slots + num_kept_prompts) * max_length tokens; untouched pages cost nothing
        on a CPU.

        Args:
            core: the model; it is not changed.
            num_slots: requests that run at once.
            max_length: tokens of one request, prompt and answer together.
            max_prefill_tokens: prompt tokens of one step at most, which bounds the gap between two tokens of a running
                stream. None: 512 on a CPU, 4096 elsewhere.
            num_kept_prompts: finished requests whose keys and values are kept although every slot runs; a free slot
                keeps what it had in any case.
            pack_weights: see `shadow`; None is right nearly always.

        Raises:
            ConfigError: the model's attention cannot be served, or a number is out of range.
        """
        self._core = core
        self._config: Any = core.language_model.config.get_text_config(decoder=True)
        check_max_length(self._config, max_length)
        if num_slots < 1 or num_kept_prompts < 0 or (max_prefill_tokens is not None and max_prefill_tokens < 1):
            raise ConfigError(f"expected at least one slot, got {num_slots=} {max_prefill_tokens=} {num_kept_prompts=}")
        self.max_length = max_length
        num_layers = _checked_num_layers(self._config)
        self._model = shadow(core.language_model, pack_weights=pack_weights)
        self._embed_tokens = self._model.get_input_embeddings()
        parameter = next(core.language_model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        if self._device.type == "cpu":
            keep_freed()
        self._max_prefill_tokens = max_prefill_tokens or _PREFILL_TOKENS.get(
            self._device.type, _PREFILL_TOKENS_ELSEWHERE
        )
        self._adapters = PassAdapters(self._model, self._device)
        self._content_keys = ContentKeys(self._config.hidden_size, self._device)
        self._waiting: deque[Request] = deque()
        cache = SlotCache(num_layers=num_layers, num_rows=num_slots + num_kept_prompts, max_length=max_length)
        self._rows = Rows(cache, num_slots)
        self.num_prompt_tokens = 0
        """Prompt tokens of all requests that began to run."""
        self.num_cached_tokens = 0
        """Those among them that were found in the cache."""
        self._warm_up()

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + self.num_running

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return self._rows.num_running

    @torch.inference_mode()
    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Embed a prompt and put it in line.

        Raises PromptTooLongError where prompt + max_tokens exceed `max_length`, and what the core's `embed` raises
        where visual tokens and placeholders differ.
        """
        check_fits(prompt, params, self.max_length)
        request_id = request_id or uuid4().hex
        in_use = any(one.request_id == request_id for one in (*self._rows.running(), *self._waiting))
        assert not in_use, f"{request_id=} is already in use"
        input_ids = torch.tensor(prompt.input_ids, dtype=torch.int64, device=self._device)
        visual = [tokens.to(self._device, self._dtype) for tokens in prompt.visual_tokens]
        adapter = prompt.adapter
        self._adapters.prepare(adapter)
        embeds = (adapter or self._core).embed(input_ids, visual)
        if prompt.answered:
            embeds = torch.cat([embeds, self._embed_answer(prompt.answered, adapter)])
        keys = self._keys(embeds, adapter)
        self._waiting.append(Request(request_id, embeds, keys, params, adapter, list(prompt.answered)))
        return request_id

    @torch.inference_mode()
    def abort(self, request_id: str) -> None:
        """Free the request's place; no further event comes. An unknown or finished id is ignored."""
        self._waiting = deque(one for one in self._waiting if one.request_id != request_id)
        for one in self._rows.running():
            if one.request_id == request_id:
                self._release(one)

    def close(self) -> None:
        """Nothing: the cache goes with the engine."""

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One token for every running request, and the first for those whose prompt is done."""
        decoding = self._rows.decoding()
        chunks = self._next_chunks()
        if not decoding and not chunks:
            return []
        logits = self._forward(decoding, chunks)
        for one in decoding:
            one.num_cached += 1
        prefilled = []
        for one, stop in chunks:
            one.num_cached = stop
            if stop == one.prompt_length:
                prefilled.append(one)
        for one in prefilled:
            one.embeds_LD = None
            self._rows.begin_decoding(one)
        return self._emit([*decoding, *prefilled], logits)

    def _warm_up(self) -> None:
        """One pass over one token: allocates the cache, and a model that cannot be served says so now."""
        embeds = torch.zeros((1, self._config.hidden_size), dtype=self._dtype, device=self._device)
        request = Request("", embeds, self._content_keys(embeds), SamplingParams(max_tokens=1))
        self._rows.admit(request)
        with torch.inference_mode():
            self._forward([], [(request, 1)])
        self._rows.release(request)

    def _next_chunks(self) -> list[tuple[Request, int]]:
        """(request, where its chunk stops) for half-computed prompts, then for waiting ones, in order of arrival."""
        budget = self._max_prefill_tokens
        chunks: list[tuple[Request, int]] = []
        for one in self._rows.prefilling():
            if not budget:
                return chunks
            chunks.append((one, min(one.prompt_length, one.num_cached + budget)))
            budget -= chunks[-1][1] - one.num_cached
        passed: list[Request] = []
        while budget and self._waiting and len(passed) < self._rows.num_free:
            one = self._waiting.popleft()
            if self._rows.is_worth_waiting(one):
                passed.append(one)
                continue
            self._rows.admit(one)
            self.num_prompt_tokens += one.prompt_length
            self.num_cached_tokens += one.num_reused
            chunks.append((one, min(one.prompt_length, one.num_cached + budget)))
            budget -= chunks[-1][1] - one.num_cached
        self._waiting.extendleft(reversed(passed))
        return chunks

    def _forward(self, decoding: Sequence[Request], chunks: Sequence[tuple[Request, int]]) -> torch.Tensor:
        """Logits [n, V] of the decoding requests, then of those whose prompt ends with its chunk."""
        positions = [one.num_cached for one in decoding]
        parts, all_positions, kept = [], list(positions), list(range(len(decoding)))
        owners = [one.adapter for one in decoding]
        if decoding:
            last = torch.tensor([one.token_ids[-1] for one in decoding], device=self._device)
            parts.append(self._adapters.embed_tokens(last, self._embed_tokens(last), owners))
        for one, stop in chunks:
            assert one.embeds_LD is not None, "a prompt is kept until it is computed"
            parts.append(one.embeds_LD[one.num_cached : stop])
            all_positions += range(one.num_cached, stop)
            owners += [one.adapter] * (stop - one.num_cached)
            if stop == one.prompt_length:
                kept.append(len(all_positions) - 1)
        slot_pass = SlotPass(
            self._rows.cache, positions, [Chunk(one.row, one.num_cached, stop) for one, stop in chunks], self._device
        )
        # A pass of unfinished prompts has no logits to keep; models want at least one position.
        kept = kept or [0]
        with self._adapters.of_pass(owners, kept):
            output = self._model(
                inputs_embeds=torch.cat(parts)[None],
                position_ids=torch.tensor([all_positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(kept, device=self._device),
                slot_pass=slot_pass,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _emit(self, requests: list[Request], logits_NV: torch.Tensor) -> list[TokenEvent]:
        if not requests:
            return []
        params = [one.params for one in requests]
        generated = [one.token_ids for one in requests]
        tokens = choose_tokens(logits_NV, params, [len(one) for one in generated], generated)
        logprobs = logprobs_of(logits_NV, params, tokens)
        events, finished = [], []
        for place, (one, token) in enumerate(zip(requests, tokens, strict=True)):
            one.token_ids.append(token)
            reason: FinishReason | None = None
            if token in one.params.stop_token_ids:
                reason = "stop"
            elif len(one.token_ids) >= one.params.max_tokens:
                reason = "length"
            if reason is not None:
                finished.append(one)
            logprob, top = logprobs.get(place, (None, ()))
            index = len(one.token_ids) - 1
            events.append(TokenEvent(one.request_id, token, index, reason, logprob, top, one.num_reused))
        # From the last row to the first, so that rows which end together are not moved around one another.
        for one in sorted(finished, key=lambda one: -one.row):
            self._release(one)
        return events

    def _release(self, request: Request) -> None:
        """Free the row; what stands in it stays a beginning for further prompts."""
        num_new = request.num_cached - request.prompt_length
        if num_new > 0:
            first = request.num_answered
            embeds = self._embed_answer(request.token_ids[first : first + num_new], request.adapter)
            request.add_keys(self._keys(embeds, request.adapter))
        self._rows.release(request)

    def _embed_answer(self, token_ids: Sequence[int], adapter: Adapter | None) -> torch.Tensor:
        """Tokens of an answer → [n, D]; a placeholder among them is a token like any other."""
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        embeds: torch.Tensor = self._embed_tokens(ids) if adapter is None else adapter.embed_tokens(ids)
        return embeds

    def _keys(self, embeds_LD: torch.Tensor, adapter: Adapter | None) -> Keys:
        return self._adapters.salted(self._content_keys(embeds_LD), adapter)


def _checked_num_layers(config: Any) -> int:
    """Layers of the model; raises ConfigError for kinds that a slot cache cannot serve."""
    kinds, _ = get_layer_types_and_kwargs(config)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(
            f"the slots engine serves full and sliding attention, {config.model_type!r} also has {', '.join(unknown)}; "
            "choose another language model"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ConfigError(
            f"the slots engine keeps keys and values of every layer, {config.model_type!r} shares them between layers; "
            "choose another language model"
        )
    return len(kinds)
