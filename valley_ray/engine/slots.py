"""SlotEngine: continuous batching over a preallocated KV cache, for any Hugging Face causal LM with a `Cache`.

Requests join and leave between steps. Running ones occupy rows 0..n-1 of the cache (the last row moves into a hole),
so one step is one forward pass over n rows and the columns of the longest of them. New prompts of similar length are
prefilled together. Greedy tokens equal Hugging Face `generate` (float32, where the top logit leads by more than 1e-4):
the batch changes float rounding and nothing else. Not thread-safe: one thread steps, adds and aborts.
n running requests, L prompt tokens, D hidden width, M maximum length, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

import torch
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.modeling_utils import PreTrainedModel

from valley_ray.engine.cache import SlotCache
from valley_ray.engine.engine import FinishReason, Prompt, SamplingParams, TokenEvent
from valley_ray.engine.sampling import choose_tokens
from valley_ray.errors import ConfigError, PromptTooLongError

logger = logging.getLogger(__name__)

_PADDING_SHARE = 0.25
"""Prompts are prefilled together while at most this share of the computed positions is padding."""


class LanguageCore(Protocol):
    """What the engine needs of a model: a causal LM, and prompts as embeddings (`valley_ray.model` has one)."""

    @property
    def language_model(self) -> PreTrainedModel:
        """A causal LM whose attention runs on sdpa or eager."""

    def embed(self, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """int64 [L] and one [P + T, D] per visual block → [L, D]."""


@dataclass(eq=False)
class _Request:
    request_id: str
    prompt_length: int
    embeds_LD: torch.Tensor | None
    """The prompt, until it is prefilled."""
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Columns of its row that are filled: the prompt and every new token but the last."""
        return self.prompt_length + len(self.token_ids) - 1


class SlotEngine:
    """The default Engine: at most `num_slots` requests run at once, the others wait in order of arrival."""

    def __init__(
        self, core: LanguageCore, *, num_slots: int = 16, max_length: int = 2048, max_prefill_tokens: int = 4096
    ) -> None:
        """Allocates keys and values for num_slots * max_length tokens (untouched pages cost nothing on a CPU).

        `max_prefill_tokens` bounds the prompt tokens of one step (one prompt always fits), so that prompts in line
        do not stall running streams. Raises ConfigError for a model whose attention the cache cannot serve.
        """
        self._core, self._num_slots, self._max_prefill_tokens = core, num_slots, max_prefill_tokens
        self._model = core.language_model
        self._config: Any = self._model.config.get_text_config(decoder=True)
        context = getattr(self._config, "max_position_embeddings", None) or max_length
        if max_length > context:
            raise ConfigError(f"max_length={max_length} is over the model's context of {context}; lower it")
        self.max_length = max_length
        self._window_of, self._eager = _attention_windows(self._config), self._config._attn_implementation == "eager"
        self._embed_tokens = self._model.get_input_embeddings()
        self._device = next(self._model.parameters()).device
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._cache = SlotCache(num_layers=len(self._window_of), num_slots=num_slots, max_length=max_length)
        self._prefill([torch.zeros((1, self._config.hidden_size), dtype=self._model.dtype, device=self._device)])

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._running)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @torch.inference_mode()
    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Embed a prompt and put it in line.

        Raises PromptTooLongError where prompt + max_tokens exceed `max_length`, and what the core's `embed` raises
        where visual tokens and placeholders differ.
        """
        needed = len(prompt.input_ids) + params.max_tokens
        if needed > self.max_length:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.input_ids)} tokens and max_tokens={params.max_tokens}, together more than "
                f"the {self.max_length} that fit; ask shorter, take fewer frames or lower max_tokens"
            )
        assert prompt.input_ids, "a prompt has at least one token"
        assert params.max_tokens > 0, "a request makes at least one token"
        request_id = request_id or uuid4().hex
        assert all(one.request_id != request_id for one in self._everyone()), f"{request_id=} is already in use"
        input_ids = torch.tensor(prompt.input_ids, dtype=torch.int64, device=self._device)
        visual = [tokens.to(self._device, self._model.dtype) for tokens in prompt.visual_tokens]
        embeds = self._core.embed(input_ids, visual)
        self._waiting.append(_Request(request_id, len(prompt.input_ids), embeds, params))
        return request_id

    def abort(self, request_id: str) -> None:
        """Free the request's place; no further event comes. An unknown or finished id is ignored."""
        self._waiting = deque(one for one in self._waiting if one.request_id != request_id)
        self._release([one for one in self._running if one.request_id == request_id])

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One token for every running request, and the first for those that find a free slot."""
        events = self._decode() if self._running else []
        while (group := self._next_group()) is not None:
            events += self._admit(group)
            if sum(one.prompt_length for one in group) >= self._max_prefill_tokens:
                break
        return events

    def _everyone(self) -> list[_Request]:
        return [*self._running, *self._waiting]

    def _next_group(self) -> list[_Request] | None:
        """The next prompts in line that fit the free slots and are worth one pass; arrival order is kept."""
        group: list[_Request] = []
        free = self._num_slots - len(self._running)
        while self._waiting and len(group) < free:
            lengths = [one.prompt_length for one in (*group, self._waiting[0])]
            computed = max(lengths) * len(lengths)
            if group and (computed > self._max_prefill_tokens or computed - sum(lengths) > _PADDING_SHARE * computed):
                break
            group.append(self._waiting.popleft())
        return group or None

    def _admit(self, group: list[_Request]) -> list[TokenEvent]:
        embeds = [one.embeds_LD for one in group if one.embeds_LD is not None]
        logits = self._prefill(embeds)
        for one in group:
            one.embeds_LD = None
        self._running += group
        return self._emit(group, logits)

    @torch.inference_mode()
    def _prefill(self, embeds_LD: Sequence[torch.Tensor]) -> torch.Tensor:
        """Prompts into the rows behind the running ones; logits [n, V] of each prompt's last position.

        Padding stands on the right: no earlier position looks at it, and decoding overwrites it.
        """
        lengths = [len(one) for one in embeds_LD]
        first = len(self._running)
        self._cache.begin_prefill(slice(first, first + len(lengths)))
        last_positions = sorted({length - 1 for length in lengths})
        output = self._model(
            inputs_embeds=torch.nn.utils.rnn.pad_sequence(list(embeds_LD), batch_first=True),
            position_ids=torch.arange(max(lengths), device=self._device).expand(len(lengths), -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(last_positions, device=self._device),
        )
        kept = torch.tensor([last_positions.index(length - 1) for length in lengths], device=self._device)
        logits: torch.Tensor = output.logits[torch.arange(len(lengths), device=self._device), kept]
        return logits

    def _decode(self) -> list[TokenEvent]:
        lengths = [one.num_cached for one in self._running]
        positions = torch.tensor(lengths, device=self._device)
        last = torch.tensor([one.token_ids[-1] for one in self._running], device=self._device)
        self._cache.begin_decode(positions, max(lengths))
        output = self._model(
            inputs_embeds=self._embed_tokens(last[:, None]),
            # Rows of one length need no mask: the model builds its own (usually none, the faster kernel).
            attention_mask=None if min(lengths) == max(lengths) else self._masks(positions, max(lengths) + 1),
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._emit(list(self._running), output.logits[:, -1])

    def _masks(self, positions: torch.Tensor, num_columns: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """[n, 1, 1, num_columns] per kind of layer: a row sees its own columns (or the window's) and no further."""
        columns = torch.arange(num_columns, device=self._device)[None]
        masks: dict[str, torch.Tensor] = {}
        for kind, window in set(self._window_of):
            seen = columns <= positions[:, None]
            if window is not None:
                seen &= columns > positions[:, None] - window
            masks[kind] = self._as_attention_mask(seen[:, None, None])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_attention_mask(self, seen: torch.Tensor) -> torch.Tensor:
        if not self._eager:
            return seen
        blocked = torch.finfo(self._model.dtype).min
        return torch.where(seen, 0.0, blocked).to(self._model.dtype)

    def _emit(self, requests: list[_Request], logits_NV: torch.Tensor) -> list[TokenEvent]:
        tokens = choose_tokens(logits_NV, [one.params for one in requests], [len(one.token_ids) for one in requests])
        events, finished = [], []
        for one, token in zip(requests, tokens, strict=True):
            one.token_ids.append(token)
            reason: FinishReason | None = None
            if token in one.params.stop_token_ids:
                reason = "stop"
            elif len(one.token_ids) >= one.params.max_tokens:
                reason = "length"
            if reason is not None:
                finished.append(one)
            events.append(TokenEvent(one.request_id, token, len(one.token_ids) - 1, reason))
        self._release(finished)
        return events

    def _release(self, finished: Sequence[_Request]) -> None:
        """Free rows; the last running row moves into each hole."""
        for one in finished:
            row, last = self._running.index(one), self._running.pop()
            if last is not one:
                self._cache.move_row(len(self._running), row, last.num_cached)
                self._running[row] = last


def _attention_windows(config: Any) -> list[tuple[str, int | None]]:
    """(kind, window) of each layer; raises ConfigError for kinds and kernels that a slot cache cannot serve."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"the slots engine needs attention 'sdpa' or 'eager', got {config._attn_implementation!r}; "
            "set attn_implementation in the model folder's config"
        )
    kinds, arguments = get_layer_types_and_kwargs(config)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(
            f"the slots engine serves full and sliding attention, {config.model_type!r} also has {', '.join(unknown)}; "
            "choose another language model"
        )
    return [(kind, one.get("sliding_window")) for kind, one in zip(kinds, arguments, strict=True)]
