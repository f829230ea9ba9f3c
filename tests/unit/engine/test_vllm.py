"""What the vLLM engine promises beyond `test_engine.py`, where vLLM is installed: seeds, its process, its weights."""

import time

import psutil
import pytest
from engine_cases import TextCore, generate, needs_vllm, prompts, run, tiny

from valley_ray.engine.adapters import Adapter
from valley_ray.engine.engine import Engine, Prompt, SamplingParams
from valley_ray.engine.open import VllmSettings, open_engine
from valley_ray.engine.slots import SlotEngine
from valley_ray.errors import ConfigError, UnavailableError

pytestmark = needs_vllm

SETTINGS = VllmSettings(compile=False)


def test_both_engines_draw_the_same_tokens_and_a_dead_process_is_said() -> None:
    model = tiny()
    ids = prompts(3)
    asked = [
        SamplingParams(max_tokens=20, temperature=1.3, seed=2**64 + 5),
        SamplingParams(max_tokens=20, temperature=0.9, top_p=0.8, top_k=40, seed=-1, frequency_penalty=0.5),
        SamplingParams(max_tokens=20, temperature=0.7, seed=8, logit_bias=((7, 2.0), (5000, 1.0))),
    ]
    requests = [(Prompt(one), params) for one, params in zip(ids, asked, strict=True)]
    expected = run(SlotEngine(TextCore(model), num_slots=3, max_length=128), requests)
    greedy = generate(model, ids[0], 9)

    engine = open_engine("vllm", TextCore(model), num_slots=3, max_length=128, vllm=SETTINGS, keep_weights=False)
    try:
        assert {parameter.device.type for parameter in model.model.layers.parameters()} == {"meta"}
        assert model.get_input_embeddings().weight.device.type == "cpu"
        assert run(engine, requests) == expected
        for ids_so_far, params, tokens in zip(ids, asked, expected, strict=True):
            # Another engine goes on with an answer that this one began.
            engine.add(Prompt(ids_so_far, answered=tuple(tokens[:7])), params)
            events = []
            while engine.num_unfinished:
                events += engine.step()
            assert [(event.index, event.token_id) for event in events] == list(enumerate(tokens))[7:]
        assert run(engine, [(Prompt(ids[0]), SamplingParams(max_tokens=9))]) == [greedy]
        with pytest.raises(ConfigError, match="serves no adapters"):
            engine.add(Prompt(ids[0], adapter=_NoAdapter()), SamplingParams(max_tokens=4))

        engine.add(Prompt(ids[0]), SamplingParams(max_tokens=100))
        children = psutil.Process().children(recursive=True)
        for child in children:
            if child.name().startswith("VLLM"):
                child.kill()
        with pytest.raises(UnavailableError, match="its log says why"):
            step_until_it_ends(engine)
    finally:
        engine.close()
    assert not [child for child in children if child.is_running() and child.name().startswith("VLLM")]


def test_a_vllm_that_does_not_start_is_said() -> None:
    settings = VllmSettings(compile=False, cache_bytes=1)
    with pytest.raises(ConfigError, match="vLLM does not start"):
        open_engine("vllm", TextCore(tiny()), num_slots=2, max_length=64, vllm=settings)


def test_heads_that_its_kernels_lack_are_said_before_it_starts() -> None:
    model = tiny()
    model.config.head_dim = 24
    with pytest.raises(ConfigError, match="the model's have 24; use the engine slots"):
        open_engine("vllm", TextCore(model), num_slots=2, max_length=64, vllm=SETTINGS)


def step_until_it_ends(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while engine.num_unfinished and time.monotonic() < deadline:
        engine.step()


class _NoAdapter(Adapter):
    """One that nothing is asked of."""
