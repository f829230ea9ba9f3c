"""What the slots engine promises beyond `test_engine.py`: families of models, columns read, budgets, cached rows."""

import pytest
import torch
from engine_cases import TextCore, generate, prompts, run, tiny

from valley_ray.engine.attention import SlotPass
from valley_ray.engine.cache import SlotCache
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.errors import ConfigError


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen2", "gemma2", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_generate_whatever_shares_the_batch(family: str, attention: str) -> None:
    model = tiny(family)
    # On sdpa, gemma2's `generate` leaves out the cap on attention scores; the engine never does.
    model.set_attn_implementation("eager" if family == "gemma2" else attention)
    lengths = [9, 3, 25, 1, 14, 30, 2]
    expected = [generate(model, ids, n) for ids, n in zip(prompts(7), lengths, strict=True)]
    engine = SlotEngine(TextCore(model), num_slots=3, max_length=128)
    requests = [(Prompt(ids), SamplingParams(max_tokens=n)) for ids, n in zip(prompts(7), lengths, strict=True)]
    assert run(engine, requests) == expected
    # Slots that others used before give the same answers, in another order of arrival too.
    assert run(engine, requests[::-1]) == expected[::-1]


def test_a_step_reads_only_the_columns_in_use() -> None:
    cache = SlotCache(num_layers=1, num_rows=8, max_length=64)

    def spans(*positions: int) -> list[tuple[int, int, int]]:
        found = SlotPass(cache, positions, [], torch.device("cpu")).spans
        return [(one.rows.start, one.rows.stop, one.longest) for one in found]

    assert spans(30, 31, 30, 28) == [(0, 4, 32)]
    # A row that is far longer than its neighbours is read alone.
    assert spans(9, 9, 60, 58, 9) == [(0, 2, 10), (2, 4, 61), (4, 5, 10)]


def test_prompts_in_line_do_not_run_in_one_step_beyond_the_prefill_budget() -> None:
    engine = SlotEngine(TextCore(tiny()), num_slots=4, max_length=64, max_prefill_tokens=20)
    for _ in range(4):
        engine.add(Prompt(tuple(range(3, 13))), SamplingParams(max_tokens=5))
    assert len(engine.step()) == 2
    assert len(engine.step()) == 4


def test_a_length_over_the_context_of_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length=257 is over the model's context of 256"):
        SlotEngine(TextCore(tiny()), max_length=257)


def test_numbers_that_no_engine_can_have_are_refused() -> None:
    for options in ({"num_slots": 0}, {"num_kept_prompts": -1}, {"max_prefill_tokens": 0}):
        with pytest.raises(ConfigError, match="expected at least one slot"):
            SlotEngine(TextCore(tiny()), max_length=64, **options)


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    model = tiny()
    engine = SlotEngine(TextCore(model), num_slots=3, max_length=256, max_prefill_tokens=16)
    stream = engine.add(Prompt((5, 6)), SamplingParams(max_tokens=30))
    engine.step()
    ids = tuple(range(3, 93))
    engine.add(Prompt(ids), SamplingParams(max_tokens=3), request_id="long")
    short = engine.add(Prompt((7, 8)), SamplingParams(max_tokens=3))
    seen = []
    while engine.num_unfinished:
        seen.append([event.request_id for event in engine.step()])
    # 90 tokens are six chunks of 16; the stream has its token in every step, and the short one fits into the last.
    assert all(stream in one for one in seen[:29])
    assert [one.count("long") for one in seen[:8]] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert seen[5] == [stream, "long", short]


def test_an_abort_in_the_middle_of_a_prompt_keeps_what_was_computed() -> None:
    model, ids = tiny(), tuple(range(3, 83))
    engine = SlotEngine(TextCore(model), num_slots=2, max_length=128, max_prefill_tokens=20)
    half = engine.add(Prompt(ids), SamplingParams(max_tokens=3))
    engine.step()
    engine.step()
    engine.abort(half)
    assert (engine.num_running, engine.num_unfinished) == (0, 0)
    assert run(engine, [(Prompt(ids), SamplingParams(max_tokens=5))]) == [generate(model, ids, 5)]
    assert engine.num_cached_tokens == 40


def test_prompts_that_arrive_together_wait_for_their_common_beginning() -> None:
    model, video = tiny(), tuple(range(3, 53))
    engine = SlotEngine(TextCore(model), num_slots=4, max_length=128)
    requests = [(Prompt((*video, 60 + index, 61)), SamplingParams(max_tokens=4)) for index in range(4)]
    assert run(engine, requests) == [generate(model, prompt.input_ids, 4) for prompt, _ in requests]
    assert engine.num_cached_tokens == 3 * len(video)
    assert engine.num_prompt_tokens == 4 * (len(video) + 2)


def test_kept_prompts_outlive_a_full_house_and_the_least_lately_used_goes_first() -> None:
    model, params = tiny(), SamplingParams(max_tokens=2)
    stems = [tuple(range(start, start + 30)) for start in (3, 23, 43, 60)]

    def num_cached(engine: SlotEngine, stem: tuple[int, ...]) -> int:
        before = engine.num_cached_tokens
        run(engine, [(Prompt(stem), params)])
        return engine.num_cached_tokens - before

    engine = SlotEngine(TextCore(model), num_slots=1, num_kept_prompts=2, max_length=64)
    assert [num_cached(engine, stems[index]) for index in (0, 1, 2, 0, 1, 3, 0, 1)] == [0, 0, 0, 29, 29, 0, 29, 29]
    assert num_cached(engine, stems[2]) == 0
    alone = SlotEngine(TextCore(model), num_slots=1, max_length=64)
    assert [num_cached(alone, stems[index]) for index in (0, 0, 1, 0)] == [0, 29, 0, 0]


def test_the_callers_model_stays_as_it_was() -> None:
    model, ids = tiny(), prompts(1)[0]
    before = generate(model, ids, 8)
    names = [type(one).__name__ for one in model.modules()]
    SlotEngine(TextCore(model), num_slots=1, max_length=64)
    assert model.config._attn_implementation == "sdpa"
    assert [type(one).__name__ for one in model.modules()] == names
    assert generate(model, ids, 8) == before


def test_plain_and_packed_weights_give_the_same_tokens() -> None:
    model = tiny()
    requests = [(Prompt(ids), SamplingParams(max_tokens=9)) for ids in prompts(5)]
    plain, packed = (
        run(SlotEngine(TextCore(model), num_slots=3, max_length=64, pack_weights=pack), requests)
        for pack in (False, True)
    )
    assert plain == packed
    with pytest.raises(ConfigError, match="pack_weights needs float32"):
        SlotEngine(TextCore(tiny().bfloat16()), max_length=64, pack_weights=True)


def test_half_precision_runs() -> None:
    model = tiny().bfloat16()
    tokens = run(
        SlotEngine(TextCore(model), num_slots=2, max_length=64),
        [(Prompt(ids), SamplingParams(max_tokens=6, logprobs=1)) for ids in prompts(3)],
    )
    assert [len(one) for one in tokens] == [6, 6, 6]


def test_an_answer_goes_on_behind_tokens_that_another_engine_made() -> None:
    model = tiny()
    ids = prompts(2)[1]
    first, second = (SlotEngine(TextCore(model), num_slots=2, max_length=len(ids) + 10) for _ in range(2))
    for params in (
        SamplingParams(max_tokens=10),
        SamplingParams(max_tokens=10, temperature=1.0, top_p=0.95, seed=7),
        SamplingParams(max_tokens=10, presence_penalty=1.5, frequency_penalty=1.0),
    ):
        (whole,) = run(first, [(Prompt(ids), params)])
        for num_answered in (4, 9):
            second.add(Prompt(ids, answered=tuple(whole[:num_answered])), params)
            events = []
            while second.num_unfinished:
                events += second.step()
            assert [event.token_id for event in events] == whole[num_answered:]
            assert [event.index for event in events] == list(range(num_answered, 10))
            assert events[-1].finish_reason == "length"
        assert run(second, [(Prompt(ids), params)]) == [whole], "what it left behind is what it computed"
