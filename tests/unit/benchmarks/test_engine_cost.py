"""The comparison of engines in small: what it reports, and that it compares no wrong tokens."""

import pytest
import torch

from valley_ray.benchmarks.engine_cost import EngineCost, engine_numbers
from valley_ray.engine.engine import TokenEvent
from valley_ray.engine.slots import SlotEngine

SMALL = EngineCost(
    num_rounds=2,
    concurrency=(1, 3),
    num_prompt_tokens=12,
    num_new_tokens=4,
    num_sequential=1,
    vocab_size=97,
    hidden_size=64,
    num_layers=2,
)


def test_every_way_has_a_cost_per_token() -> None:
    numbers = engine_numbers(SMALL)
    assert {name: list(costs) for name, costs in numbers.items()} == {"generate": ["1"], "slots": ["1", "3"]}
    assert numbers["generate"]["1"].times_generate == 1.0
    assert all(cost.cpu_ms_per_token > 0 and cost.wall_ms_per_token > 0 for cost in numbers["slots"].values())


def test_an_engine_with_other_tokens_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SlotEngine.step

    def wrong(engine: SlotEngine) -> list[TokenEvent]:
        return [TokenEvent(one.request_id, 5, one.index, one.finish_reason) for one in step(engine)]

    monkeypatch.setattr(SlotEngine, "step", wrong)
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match="generate has"):
        engine_numbers(SMALL)
