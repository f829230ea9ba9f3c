"""Small language models, prompts and the oracle for tests of engines: Hugging Face `generate`, one prompt at a time.

The second engine is tried with VALLEY_VLLM=1, where vLLM is installed (docs/serving.md).
"""

import hashlib
import itertools
import os
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from valley_ray.engine.engine import Engine, Prompt, SamplingParams
from valley_ray.engine.open import VllmSettings
from valley_ray.engine.open import open_engine as open_by_name
from valley_ray.engine.slots import SlotEngine

HAS_VLLM = os.environ.get("VALLEY_VLLM") == "1"

needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="set VALLEY_VLLM=1 where vLLM is installed (docs/serving.md)")

ENGINES = ("slots", pytest.param("vllm", marks=needs_vllm))
"""Names that `open_engine` knows."""

LOCKSTEP = frozenset({"slots"})
"""Engines whose step advances every running request; others compute on their own and hand out what has come."""

FINDS_ANSWERS = frozenset({"slots"})
"""Engines that find the tokens of an answer in the cache when a later prompt goes on from it."""

SHARED_TOKENS = {"slots": 1, "vllm": 32}
"""Prompts share whole runs of so many tokens."""

_VLLM_SLOTS, _VLLM_LENGTH = 4, 128
_vllm: list[tuple[str, Engine]] = []
"""The one that runs, and the weights that it runs: a start takes many seconds."""


def open_engine(
    name: str, model: PreTrainedModel, *, num_slots: int, max_length: int, max_prefill_tokens: int | None = None
) -> Engine:
    """An engine of that kind over `model`; visual tokens of a prompt replace its first embeddings.

    vLLM is started once per model, with slots of its own number and nothing in its cache.
    """
    if name == "vllm":
        return _open_vllm(model, max_length)
    assert name == "slots", f"no engine {name!r}"
    return SlotEngine(
        TextCore(model), num_slots=num_slots, max_length=max_length, max_prefill_tokens=max_prefill_tokens
    )


def _open_vllm(model: PreTrainedModel, max_length: int) -> Engine:
    weights = hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in model.parameters())).hexdigest()
    if not _vllm or _vllm[0][0] != weights:
        close_engines()
        settings = VllmSettings(compile=False)
        engine = open_by_name("vllm", TextCore(model), num_slots=_VLLM_SLOTS, max_length=_VLLM_LENGTH, vllm=settings)
        _vllm.append((weights, engine))
    engine = _vllm[0][1]
    assert not engine.num_unfinished, "the test before left a request"
    engine.forget_prompts()
    engine.max_length = max_length
    return engine


def close_engines() -> None:
    """End the vLLM that runs."""
    while _vllm:
        _vllm.pop()[1].close()


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the narrowest that vLLM serves
    "max_position_embeddings": 256,
}


class TextCore:
    """A core without vision: the language model and its own embeddings; visual tokens replace the first ones."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        self.language_model = language_model

    def embed(self, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        embeds = self.language_model.get_input_embeddings()(input_ids)
        return torch.cat([*visual_tokens, embeds[sum(map(len, visual_tokens)) :]])


def tiny(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif family == "mistral_sliding":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9))
    elif family == "gemma2":
        sizes = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 9, "tie_word_embeddings": False}
        # Wide weights: scores that reach the cap. Tied ones would repeat the last token whatever attention does.
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=0.5, initializer_range=0.5))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=["sliding_attention", "full_attention"])
        )
    model.generation_config.eos_token_id = None  # answers end where the tests say
    return model.eval()


def prompts(count: int, *, seed: int = 1) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 31, 6, 17, 5, 44, 30, 8, 12, 5]
    return [
        tuple(torch.randint(3, 97, (length,), generator=generator).tolist())
        for length in itertools.islice(itertools.cycle(lengths), count)
    ]


def generate(model: PreTrainedModel, input_ids: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    ids = torch.tensor([input_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
    )
    return output[0, len(input_ids) :].tolist()


def run(engine: Engine, requests: Sequence[tuple[Prompt, SamplingParams]]) -> list[list[int]]:
    ids = [engine.add(prompt, params) for prompt, params in requests]
    tokens: dict[str, list[int]] = {one: [] for one in ids}
    while engine.num_unfinished:
        for event in engine.step():
            assert event.index == len(tokens[event.request_id])
            tokens[event.request_id].append(event.token_id)
    return [tokens[one] for one in ids]
