"""The engine's interface: requests in, token events out, one `step` at a time.

`add` puts a prompt in line, `step` advances every running request by at most one token, `abort` frees a place.
The interface knows tokens and embeddings only: text, stop strings and media belong to the rooms above and below.
Importing this module loads no torch.
Shapes: L prompt tokens, P patch tokens, T frames, D hidden width of the language model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from valley_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids of a prompt and the visual tokens to splice into it, in the order of its visual blocks."""

    input_ids: tuple[int, ...]
    """L token ids; each visual block stands there as its placeholder tokens."""
    visual_tokens: "tuple[torch.Tensor, ...]" = ()
    """One [P + T, D] tensor per visual block: P pooled patch tokens, then one token per frame."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Temperature 0 is greedy.

    Raises ConfigError for a number outside its range.
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

    def __post_init__(self) -> None:
        fits = {
            "max_tokens >= 1": self.max_tokens >= 1,
            "0 <= temperature < inf": 0 <= self.temperature < float("inf"),
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
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


class Engine(Protocol):
    """Continuous batching over one language model."""

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Put a request in line and return its id; raises PromptTooLongError where prompt + max_tokens cannot fit."""

    def step(self) -> list[TokenEvent]:
        """Admit waiting requests into free slots, advance all running ones by one token."""

    def abort(self, request_id: str) -> None:
        """Free the request's place; no further event comes. An unknown or finished id is ignored."""

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
