"""The engine's interface: requests in, token events out, one `step` at a time.

`add` puts a prompt in line, `step` advances every running request by at most one token, `abort` frees a place.
The interface knows tokens and embeddings only: text, stop strings and media belong to the rooms above and below, and
so does `n`: several answers to one prompt are several requests with seeds of their own, which share its cached prefix.
Importing this module loads no torch.
Shapes: L prompt tokens, P patch tokens, T frames, D hidden width of the language model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from valley_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from valley_ray.engine.adapters import Adapter

FinishReason = Literal["stop", "length"]

MOST_LOGPROBS = 20
"""Alternatives per token that a request may ask for, as in the OpenAI API."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids of a prompt and the visual tokens to splice into it, in the order of its visual blocks."""

    input_ids: tuple[int, ...]
    """L token ids; each visual block stands there as its placeholder tokens."""
    visual_tokens: "tuple[torch.Tensor, ...]" = ()
    """One [P + T, D] tensor per visual block: P pooled patch tokens, then one token per frame."""
    adapter: "Adapter | None" = None
    """What changes the model for this request alone; its visual tokens have to be the adapter's own too."""
    answered: tuple[int, ...] = ()
    """Tokens that the answer has already, made by an engine that is gone: the next one is computed behind them, with
    their positions, penalties and `max_tokens` counted as if they had been made here."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Temperature 0 is greedy.

    Order: `logit_bias` and penalties change the logits, then temperature, top-k and top-p. Raises ConfigError for a
    number outside its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means off."""
    seed: int = 0
    """Random numbers depend on (seed, position) alone, so that any replica reproduces them."""
    stop_token_ids: tuple[int, ...] = ()
    """End tokens; the one that ends a request is not reported as text but is an event."""
    presence_penalty: float = 0.0
    """-2 to 2, taken from the logit of every token that the answer already has (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """-2 to 2, taken once for each time that the answer already has the token; the prompt does not count."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit, -100 to 100); an id that the model lacks is ignored."""
    logprobs: int | None = None
    """None: events carry no log-probabilities; 0: that of the chosen token; k up to 20: and of the k likeliest."""

    def __post_init__(self) -> None:
        fits = {
            "max_tokens >= 1": self.max_tokens >= 1,
            "0 <= temperature < inf": 0 <= self.temperature < float("inf"),
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
            "-2 <= presence_penalty <= 2": -2 <= self.presence_penalty <= 2,
            "-2 <= frequency_penalty <= 2": -2 <= self.frequency_penalty <= 2,
            "-100 <= logit_bias <= 100": all(-100 <= bias <= 100 for _, bias in self.logit_bias),
            f"0 <= logprobs <= {MOST_LOGPROBS}": self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
        }
        if not all(fits.values()):
            wrong = ", ".join(rule for rule, holds in fits.items() if not holds)
            raise ConfigError(f"sampling parameters must have {wrong}; got {self}")


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one request; the last one of a request says why it is the last."""

    request_id: str
    token_id: int
    index: int
    """Position among the request's new tokens, from 0."""
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    """Natural logarithm of the token's probability under the model's own logits: in float32, before bias, penalties
    and temperature. None where the request did not ask."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of as many likeliest tokens as the request asked for, likeliest first."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed, because an earlier prompt began in the same way."""


class Engine(Protocol):
    """Continuous batching over one language model."""

    max_length: int
    """Most tokens of one request, prompt and answer together."""

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Put a request in line and return its id; raises PromptTooLongError where prompt + max_tokens cannot fit."""

    def step(self) -> list[TokenEvent]:
        """Admit waiting requests into free slots, advance all running ones by at most one token."""

    def abort(self, request_id: str) -> None:
        """Free the request's place; no further event comes. An unknown or finished id is ignored."""

    def close(self) -> None:
        """Give back what the engine holds beside this process's memory; it is not used afterwards."""

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""

    @property
    def num_running(self) -> int:
        """Requests that hold a place."""
