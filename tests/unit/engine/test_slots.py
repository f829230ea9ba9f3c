"""The oracle is Hugging Face `generate`, one prompt at a time, on small random models of several families."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from transformers import (
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

from valley_ray.engine.attention import SlotPass
from valley_ray.engine.cache import SlotCache
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.errors import ConfigError, PromptTooLongError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=9, layer_types=["sliding_attention", "full_attention"])
        )
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


def run(engine: SlotEngine, requests: Sequence[tuple[Prompt, SamplingParams]]) -> list[list[int]]:
    ids = [engine.add(prompt, params) for prompt, params in requests]
    tokens: dict[str, list[int]] = {one: [] for one in ids}
    while engine.num_unfinished:
        for event in engine.step():
            assert event.index == len(tokens[event.request_id])
            tokens[event.request_id].append(event.token_id)
    return [tokens[one] for one in ids]


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen2", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_generate_whatever_shares_the_batch(family: str, attention: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(attention)
    lengths = [9, 3, 25, 1, 14, 30, 2]
    expected = [generate(model, ids, n) for ids, n in zip(prompts(7), lengths, strict=True)]
    engine = SlotEngine(TextCore(model), num_slots=3, max_length=128)
    requests = [(Prompt(ids), SamplingParams(max_tokens=n)) for ids, n in zip(prompts(7), lengths, strict=True)]
    assert run(engine, requests) == expected
    # Slots that others used before give the same answers, in another order of arrival too.
    assert run(engine, requests[::-1]) == expected[::-1]


def test_stop_token_ends_a_request_and_is_its_last_event() -> None:
    model = tiny()
    ids = prompts(1)[0]
    free = generate(model, ids, 20)
    stop = free[6]
    engine = SlotEngine(TextCore(model), num_slots=2, max_length=64)
    request_id = engine.add(Prompt(ids), SamplingParams(max_tokens=20, stop_token_ids=(stop,)))
    events = list(itertools.chain.from_iterable(iter(engine.step, [])))
    assert [event.token_id for event in events] == generate(model, ids, 20, [stop])
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert {event.request_id for event in events} == {request_id}


def test_visual_tokens_reach_the_prompt() -> None:
    model = tiny()
    ids = prompts(2)[1]
    visual = model.get_input_embeddings()(torch.tensor(prompts(2)[1][:4])).detach()
    engine = SlotEngine(TextCore(model), num_slots=2, max_length=64)
    params = SamplingParams(max_tokens=8)
    other = visual.flip(0)
    same, changed = run(engine, [(Prompt(ids, (visual,)), params), (Prompt(ids, (other,)), params)])
    assert same == generate(model, ids, 8)
    swapped = model.generate(
        inputs_embeds=TextCore(model).embed(torch.tensor(ids), [other])[None], max_new_tokens=8, do_sample=False
    )
    assert changed == swapped[0].tolist()


def test_sampled_tokens_depend_on_seed_and_position_alone() -> None:
    model = tiny()
    params = [SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2, 1)]
    alone = [
        run(SlotEngine(TextCore(model), num_slots=1, max_length=64), [(Prompt(prompts(1)[0]), one)])[0]
        for one in params
    ]
    crowd = [(Prompt(ids), SamplingParams(max_tokens=9, temperature=0.7, seed=9)) for ids in prompts(5, seed=3)]
    mixed = run(
        SlotEngine(TextCore(model), num_slots=8, max_length=64),
        [*crowd, *((Prompt(prompts(1)[0]), one) for one in params)],
    )
    assert mixed[5:] == alone
    assert alone[0] == alone[2] != alone[1]


def test_abort_frees_the_slot_and_leaves_the_others_alone() -> None:
    model = tiny()
    ids = prompts(4)
    expected = [generate(model, one, 15) for one in ids]
    engine = SlotEngine(TextCore(model), num_slots=3, max_length=64)
    names = [engine.add(Prompt(one), SamplingParams(max_tokens=15)) for one in ids]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for step in itertools.count():
        if step == 4:
            engine.abort(names[0])
            engine.abort("nobody")
            assert (engine.num_running, engine.num_unfinished) == (2, 3)
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
        if not engine.num_unfinished:
            break
    assert tokens[names[0]] == expected[0][:4]
    assert [tokens[name] for name in names[1:]] == expected[1:]


def test_a_waiting_request_can_be_aborted() -> None:
    engine = SlotEngine(TextCore(tiny()), num_slots=1, max_length=64)
    engine.add(Prompt((5, 6)), SamplingParams(max_tokens=2))
    waiting = engine.add(Prompt((5, 6)), SamplingParams(max_tokens=2))
    engine.abort(waiting)
    assert engine.num_unfinished == 1


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers() -> None:
    engine = SlotEngine(TextCore(tiny()), num_slots=1, max_length=32)
    with pytest.raises(PromptTooLongError, match=r"31 tokens and max_tokens=2.*32"):
        engine.add(Prompt(tuple(range(3, 34))), SamplingParams(max_tokens=2))
    engine.add(Prompt(tuple(range(3, 33))), SamplingParams(max_tokens=2))
    assert sum(len(engine.step()) for _ in range(2)) == 2


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
