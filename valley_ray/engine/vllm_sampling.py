"""The house's choice of tokens inside vLLM: penalties, bias and seeded draws by `valley_ray.engine.sampling`.

Runs in vLLM's engine process. vLLM itself always takes the likeliest token; where a request wants something else, its
logits are replaced by ones that leave a single token. So a drawn token depends on (seed, position) alone, as with every
engine, and not on how often vLLM used a generator. Log-probabilities are taken before this, from the model's logits.
N rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from valley_ray.engine.engine import SamplingParams
from valley_ray.engine.sampling import choose_tokens
from valley_ray.engine.vllm_owner import end_with_owner

EXTRA_ARG = "valley_sampling"
"""Where vLLM's SamplingParams carry ours."""

_FIELDS = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "logit_bias")

_Row = tuple[SamplingParams, list[int], list[int]]
"""What a request wants, the tokens that its answer had before, and those made here, which vLLM goes on writing."""


def extra_args(params: SamplingParams, answered: Sequence[int] = ()) -> dict[str, Any] | None:
    """What the engine process has to know about a request whose answer has the tokens `answered` already.

    None where the likeliest token is wanted.
    """
    chosen = {name: value for name, value in asdict(params).items() if name in _FIELDS}
    plain = asdict(SamplingParams())
    if all(chosen[name] == plain[name] for name in _FIELDS if name not in ("seed", "top_p", "top_k")):
        return None
    # Integers between processes have 64 bits; the draw takes the seed modulo 2**64 in any case.
    return {EXTRA_ARG: {"params": {**chosen, "seed": params.seed % 2**64}, "answered": list(answered)}}


class HouseSampling(LogitsProcessor):
    """One per engine process; vLLM tells it who joins, moves and leaves."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        # The first of our own code that runs in vLLM's process, and the only one that does in every case.
        end_with_owner()

    def is_argmax_invariant(self) -> bool:
        """No: it is the choice."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch."""
        process_dict_updates(self._rows, batch_update, _row_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [N, V], in place: one token is left in each row that asks."""
        if not self._rows:
            return logits
        rows = list(self._rows)
        params = [one for one, _, _ in self._rows.values()]
        answers = [[*before, *new] for _, before, new in self._rows.values()]
        tokens = choose_tokens(logits[rows], params, [len(answer) for answer in answers], answers)
        logits[rows] = -torch.inf
        logits[rows, tokens] = 0.0
        return logits


def _row_of(params: Any, prompt_token_ids: list[int] | None, answer: list[int]) -> _Row | None:
    asked: Mapping[str, Any] | None = (params.extra_args or {}).get(EXTRA_ARG)
    if asked is None:
        return None
    bias = tuple((token, amount) for token, amount in asked["params"]["logit_bias"])
    return SamplingParams(**{**asked["params"], "logit_bias": bias}), asked["answered"], answer
