"""What an engine's tokens cost beside sequential Hugging Face `generate`, in CPU and wall time per new token.

A LLaMA of random weights, every prompt new (nothing is found in a cache), greedy. All sides take turns in every round:
what the machine does beside them meets them alike. CPU time counts the processes that an engine has started. Knows no
Ray.
L prompt tokens, D hidden width.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from valley_ray.benchmarks.process_cost import process_tree
from valley_ray.config import Config
from valley_ray.engine.engine import Engine, Prompt, SamplingParams
from valley_ray.engine.open import EngineKind, open_engine

LEAST_LEAD = 1e-4
"""Tokens must be equal where the likeliest leads by more (docs: exactness)."""

_GENERATE = "generate"


class EngineCost(Config):
    """What is timed."""

    num_rounds: int = Field(default=5, ge=1)
    """Medians over the rounds are reported."""
    concurrency: tuple[int, ...] = (1, 4, 16)
    """Requests that come at once."""
    num_prompt_tokens: int = Field(default=304, ge=2)
    """L: a video block of 264 tokens and a question."""
    num_new_tokens: int = Field(default=64, ge=2)
    """Of each answer."""
    num_sequential: int = Field(default=1, ge=1)
    """Prompts of every case that `generate` answers too, one after the other: its time, and what is compared."""
    vocab_size: int = Field(default=32000, ge=8)
    """LLaMA's."""
    hidden_size: int = Field(default=512, ge=64, multiple_of=64)
    """D."""
    num_layers: int = Field(default=8, ge=1)
    """With the defaults 58 million parameters."""


@dataclass(frozen=True)
class Cost:
    """Medians of one way at one number of requests."""

    cpu_ms_per_token: float
    wall_ms_per_token: float
    """Time of all divided by the new tokens of all."""
    times_generate: float
    """Median over the rounds of: CPU time per token of `generate` in that round, divided by this way's."""


class _Core:
    """A language model as the engine takes it, without vision."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        self.language_model = language_model

    def embed(self, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        assert not visual_tokens, "prompts of text only"
        embeds: torch.Tensor = self.language_model.get_input_embeddings()(input_ids)
        return embeds


def engine_numbers(
    config: EngineCost, kinds: Sequence[EngineKind] = ("slots",), *, say: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Cost]]:
    """Engine → number of requests (as text, for JSON) → cost; `generate` is there under "1".

    The caller sets torch's threads. Raises AssertionError where tokens differ from those of `generate` although the
    likeliest led by more than LEAST_LEAD: then there is nothing to compare.
    """
    core = _Core(make_model(config))
    max_length = config.num_prompt_tokens + config.num_new_tokens
    opened: dict[str, Engine] = {}
    try:
        for kind in kinds:
            opened[kind] = open_engine(kind, core, num_slots=max(config.concurrency), max_length=max_length)
        rounds = _rounds(core.language_model, opened, config, say)
    finally:
        for engine in opened.values():
            engine.close()
    costs: dict[str, dict[str, Cost]] = {}
    for place, (name, count, _) in enumerate(rounds[0]):
        measured = [one[place][2] for one in rounds]
        ratios = [one[0][2].cpu_ms / one[place][2].cpu_ms for one in rounds]
        cost = Cost(
            round(median(one.cpu_ms for one in measured), 2),
            round(median(one.wall_ms for one in measured), 2),
            round(median(ratios), 2),
        )
        costs.setdefault(name, {})[str(count)] = cost
    return costs


def make_model(config: EngineCost) -> PreTrainedModel:
    """A LLaMA of random weights."""
    text = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 43 // 16,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // 64,
        max_position_embeddings=max(2048, config.num_prompt_tokens + config.num_new_tokens),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(text).eval()


@dataclass(frozen=True)
class _Measured:
    cpu_ms: float
    wall_ms: float


def _rounds(
    model: PreTrainedModel, engines: Mapping[str, Engine], config: EngineCost, say: Callable[[str], None]
) -> "list[list[tuple[str, int, _Measured]]]":
    generator = torch.Generator().manual_seed(0)
    for engine in engines.values():
        _answer(engine, _prompts(config, 1, generator), config)  # warm-up, with prompts that do not come again
    _generate(model, _prompts(config, 1, generator), config)
    rounds = []
    for number in range(config.num_rounds):
        rounds.append(list(_round(model, engines, config, number, generator)))
        costs = ", ".join(f"{name} x{count} {one.cpu_ms:.1f}" for name, count, one in rounds[-1])
        say(f"engines, round {number + 1}, CPU ms per token: {costs}")
    return rounds


def _round(
    model: PreTrainedModel,
    engines: Mapping[str, Engine],
    config: EngineCost,
    number: int,
    generator: torch.Generator,
) -> Iterator[tuple[str, int, _Measured]]:
    """(way, requests, cost per token) of every case, `generate` first; the order of running turns with the round."""
    prompts = {count: _prompts(config, count, generator) for count in config.concurrency}
    compared = {count: given[: config.num_sequential] for count, given in prompts.items()}
    sequential = [prompt for given in compared.values() for prompt in given]
    cases: list[tuple[str, int, Callable[[], list[list[int]]]]] = [
        (_GENERATE, 1, lambda: _generate(model, sequential, config))
    ]
    for name, engine in engines.items():
        for count, given in prompts.items():
            cases.append((name, count, lambda engine=engine, given=given: _answer(engine, given, config)))  # type: ignore[misc]
    tokens: dict[tuple[str, int], list[list[int]]] = {}
    measured: dict[tuple[str, int], _Measured] = {}
    turn = number % len(cases)
    for name, count, run in (*cases[turn:], *cases[:turn]):
        others_s, cpu_s, wall_s = _others_s(), time.process_time(), time.perf_counter()
        tokens[name, count] = run()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s + _others_s() - others_s
        num_tokens = sum(map(len, tokens[name, count]))
        measured[name, count] = _Measured(cpu_s * 1000 / num_tokens, wall_s * 1000 / num_tokens)
    for name in engines:
        expected = iter(tokens[_GENERATE, 1])
        for count, given in compared.items():
            for prompt, came in zip(given, tokens[name, count], strict=False):
                _check_equal(model, prompt, next(expected), came)
    for name, count, _ in cases:
        yield name, count, measured[name, count]


def _others_s() -> float:
    """CPU seconds of the processes that this one has started."""
    _, *others = process_tree(os.getpid())
    return sum(one.cpu_s for one in others)


def _prompts(config: EngineCost, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Prompts that nobody has seen."""
    shape = (count, config.num_prompt_tokens)
    return [tuple(row) for row in torch.randint(3, config.vocab_size, shape, generator=generator).tolist()]


def _answer(engine: Engine, prompts: Sequence[tuple[int, ...]], config: EngineCost) -> list[list[int]]:
    """All at once."""
    params = SamplingParams(max_tokens=config.num_new_tokens)
    tokens: dict[str, list[int]] = {engine.add(Prompt(ids), params): [] for ids in prompts}
    while engine.num_unfinished:
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
    return list(tokens.values())


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], config: EngineCost) -> list[list[int]]:
    """One after the other."""
    answers: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        count = config.num_new_tokens
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@torch.inference_mode()
def _check_equal(model: PreTrainedModel, prompt: Sequence[int], expected: list[int], came: list[int]) -> None:
    """Up to the first token whose lead is within rounding; behind it both go their own ways."""
    for index, pair in enumerate(zip(expected, came, strict=True)):
        if pair[0] != pair[1]:
            logits = model(torch.tensor([[*prompt, *expected[:index]]]), logits_to_keep=1).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            assert first - second <= LEAST_LEAD, f"token {index} is {pair[1]}, generate has {pair[0]}"
            return
