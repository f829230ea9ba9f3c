"""Engines by name: the default needs nothing, the extra says how to install it."""

import importlib.util

import pytest
from engine_cases import TextCore, generate, prompts, run, tiny

from valley_ray.engine import open as open_module
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.open import VllmSettings, open_engine
from valley_ray.errors import ConfigError


def test_the_default_engine_has_the_asked_size() -> None:
    model, ids = tiny(), prompts(1)[0]
    engine = open_engine("slots", TextCore(model), num_slots=2, max_length=48, keep_weights=False)
    assert run(engine, [(Prompt(ids), SamplingParams(max_tokens=5))]) == [generate(model, ids, 5)]
    assert engine.max_length == 48
    for _ in range(3):
        engine.add(Prompt(ids), SamplingParams(max_tokens=3))
    engine.step()
    assert engine.num_running == 2


def test_an_engine_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_no_vllm(name: str) -> object:
        return None if name == "vllm" else importlib.util.find_spec(name)

    monkeypatch.setattr(open_module, "find_spec", find_no_vllm)
    with pytest.raises(ConfigError, match=r"pip install 'valley-ray\[vllm\]'"):
        open_engine("vllm", TextCore(tiny()))


def test_settings_of_the_extra_have_ranges() -> None:
    for values in ({"gpu_memory_utilization": 0.0}, {"tensor_parallel_size": 0}, {"cache_bytes": 0}, {"blocks": 3}):
        with pytest.raises(ValueError, match=next(iter(values))):
            VllmSettings(**values)
