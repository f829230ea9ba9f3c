"""What every engine promises, whichever runs the model. The oracle is the model alone, one prompt at a time."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from engine_cases import (
    ENGINES,
    FINDS_ANSWERS,
    LOCKSTEP,
    SHARED_TOKENS,
    TextCore,
    close_engines,
    generate,
    open_engine,
    prompts,
    run,
    tiny,
)
from transformers import PreTrainedModel

from valley_ray.engine.engine import Engine, Prompt, SamplingParams, TokenEvent
from valley_ray.errors import PromptTooLongError


@pytest.fixture(scope="module", autouse=True)
def closed_engines() -> Iterator[None]:
    """Engines that outlive a test do not outlive this module."""
    yield
    close_engines()


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    """Name of an engine."""
    return str(request.param)


def events_of(engine: Engine, *requests: tuple[Prompt, SamplingParams]) -> list[list[TokenEvent]]:
    """Events per request, in order."""
    ids = [engine.add(prompt, params) for prompt, params in requests]
    events: dict[str, list[TokenEvent]] = {one: [] for one in ids}
    while engine.num_unfinished:
        for event in engine.step():
            events[event.request_id].append(event)
    return [events[one] for one in ids]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, ids: Sequence[int], count: int, change: Callable[[torch.Tensor, list[int]], None]
) -> list[int]:
    """Likeliest tokens after `change` had its way with each step's logits [V]."""
    tokens: list[int] = []
    for _ in range(count):
        logits = model(torch.tensor([[*ids, *tokens]])).logits[0, -1].clone()
        change(logits, tokens)
        tokens.append(int(logits.argmax()))
    return tokens


def test_stop_token_ends_a_request_and_is_its_last_event(kind: str) -> None:
    model = tiny()
    ids = prompts(1)[0]
    free = generate(model, ids, 20)
    stop = free[6]
    engine = open_engine(kind, model, num_slots=2, max_length=64)
    request_id = engine.add(Prompt(ids), SamplingParams(max_tokens=20, stop_token_ids=(stop,)))
    events = []
    while engine.num_unfinished:
        events += engine.step()
    assert engine.step() == []
    assert [event.token_id for event in events] == generate(model, ids, 20, [stop])
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert {event.request_id for event in events} == {request_id}


def test_visual_tokens_reach_the_prompt(kind: str) -> None:
    model = tiny()
    ids = prompts(2)[1]
    visual = model.get_input_embeddings()(torch.tensor(prompts(2)[1][:4])).detach()
    engine = open_engine(kind, model, num_slots=2, max_length=64)
    params = SamplingParams(max_tokens=8)
    other = visual.flip(0)
    same, changed = run(engine, [(Prompt(ids, (visual,)), params), (Prompt(ids, (other,)), params)])
    assert same == generate(model, ids, 8)
    swapped = model.generate(
        inputs_embeds=TextCore(model).embed(torch.tensor(ids), [other])[None], max_new_tokens=8, do_sample=False
    )
    assert changed == swapped[0].tolist()


def test_sampled_tokens_depend_on_seed_and_position_alone(kind: str) -> None:
    model = tiny()
    params = [SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2, 1)]
    alone = [
        run(open_engine(kind, model, num_slots=1, max_length=64), [(Prompt(prompts(1)[0]), one)])[0] for one in params
    ]
    crowd = [(Prompt(ids), SamplingParams(max_tokens=9, temperature=0.7, seed=9)) for ids in prompts(5, seed=3)]
    mixed = run(
        open_engine(kind, model, num_slots=8, max_length=64),
        [*crowd, *((Prompt(prompts(1)[0]), one) for one in params)],
    )
    assert mixed[5:] == alone
    assert alone[0] == alone[2] != alone[1]


def test_abort_frees_the_slot_and_leaves_the_others_alone(kind: str) -> None:
    model = tiny()
    ids = prompts(4)
    expected = [generate(model, one, 15) for one in ids]
    engine = open_engine(kind, model, num_slots=3, max_length=64)
    names = [engine.add(Prompt(one), SamplingParams(max_tokens=15)) for one in ids]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    while engine.num_unfinished:
        if len(tokens[names[0]]) == 4 and engine.num_unfinished == 4:
            engine.abort(names[0])
            engine.abort("nobody")
            assert engine.num_unfinished == 3
            assert kind not in LOCKSTEP or engine.num_running == 2
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
    assert tokens[names[0]] == expected[0][:4]
    assert [tokens[name] for name in names[1:]] == expected[1:]


def test_a_waiting_request_can_be_aborted(kind: str) -> None:
    engine = open_engine(kind, tiny(), num_slots=1, max_length=64)
    engine.add(Prompt((5, 6)), SamplingParams(max_tokens=2))
    waiting = engine.add(Prompt((5, 6)), SamplingParams(max_tokens=2))
    engine.abort(waiting)
    assert engine.num_unfinished == 1
    events = []
    while engine.num_unfinished:
        events += engine.step()
    assert len(events) == 2


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(kind: str) -> None:
    engine = open_engine(kind, tiny(), num_slots=1, max_length=32)
    with pytest.raises(PromptTooLongError, match=r"31 tokens and max_tokens=2.*32"):
        engine.add(Prompt(tuple(range(3, 34))), SamplingParams(max_tokens=2))
    [answer] = run(engine, [(Prompt(tuple(range(3, 33))), SamplingParams(max_tokens=2))])
    assert len(answer) == 2


def test_penalties_count_the_tokens_of_the_answer(kind: str) -> None:
    model, ids = tiny(), prompts(2)[1]
    plain = generate(model, ids, 20)
    assert max(Counter(plain).values()) > 1, "the case needs an answer that repeats itself"

    def change(logits: torch.Tensor, tokens: list[int], presence: float, frequency: float) -> None:
        for token, count in Counter(tokens).items():
            logits[token] -= presence + count * frequency

    pairs = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.05), (2.0, 2.0), (-1.0, 0.5)]
    expected = [
        greedy(model, ids, 20, lambda logits, tokens, pair=pair: change(logits, tokens, *pair)) for pair in pairs
    ]
    requests = [
        (Prompt(ids), SamplingParams(max_tokens=20, presence_penalty=presence, frequency_penalty=frequency))
        for presence, frequency in pairs
    ]
    assert run(open_engine(kind, model, num_slots=4, max_length=64), requests) == expected
    assert expected[0] == plain != expected[3]
    assert max(Counter(expected[3]).values()) == 1


def test_logit_bias_bans_and_forces_tokens(kind: str) -> None:
    model, ids = tiny(), prompts(1)[0]
    first = generate(model, ids, 1)[0]

    def ban(logits: torch.Tensor, tokens: list[int]) -> None:
        logits[first] -= 100

    banned, forced = (
        SamplingParams(max_tokens=6, logit_bias=((first, -100.0), (5000, 1.0))),
        SamplingParams(max_tokens=6, logit_bias=((42, 100.0),)),
    )
    engine = open_engine(kind, model, num_slots=2, max_length=64)
    assert run(engine, [(Prompt(ids), banned), (Prompt(ids), forced)]) == [greedy(model, ids, 6, ban), [42] * 6]


def test_logprobs_are_those_of_the_models_own_logits(kind: str) -> None:
    model, ids = tiny(), prompts(1)[0]
    asked = [
        SamplingParams(max_tokens=5, logprobs=3),
        SamplingParams(max_tokens=5),
        SamplingParams(max_tokens=5, logprobs=0),
        # What bends the choice does not bend what is reported.
        SamplingParams(max_tokens=5, logprobs=2, temperature=2.0, seed=4, logit_bias=((7, 3.0),), presence_penalty=1.0),
    ]
    answers = events_of(open_engine(kind, model, num_slots=4, max_length=64), *((Prompt(ids), one) for one in asked))
    for params, events in zip(asked, answers, strict=True):
        tokens = [event.token_id for event in events]
        with torch.no_grad():
            expected = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(dim=-1)
        for event, row in zip(events, expected, strict=True):
            if params.logprobs is None:
                assert (event.logprob, event.top_logprobs) == (None, ())
                continue
            # 1e-5: rounding of float32 logits of order 1.
            assert event.logprob == pytest.approx(row[event.token_id].item(), abs=1e-5)
            top = row.topk(params.logprobs)
            assert [token for token, _ in event.top_logprobs] == top.indices.tolist()
            assert [value for _, value in event.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_a_like_beginning_is_computed_once(kind: str) -> None:
    model = tiny()
    video, text = prompts(6)[5], prompts(2)[1]
    questions = [(*text[:4], *video, *text[4 + index : 12 + index]) for index in range(3)]
    shared = 4 + len(video)

    def whole(length: int) -> int:
        return length - length % SHARED_TOKENS[kind]

    engine = open_engine(kind, model, num_slots=2, max_length=128)
    params = SamplingParams(max_tokens=6)
    for index, ids in enumerate(questions):
        [events] = events_of(engine, (Prompt(ids), params))
        assert [event.token_id for event in events] == generate(model, ids, 6)
        assert {event.num_cached_tokens for event in events} == {whole(shared) if index else 0}
    # The last position is always computed: its logits choose the first token.
    [events] = events_of(engine, (Prompt(questions[2]), params))
    assert events[0].num_cached_tokens == whole(len(questions[2]) - 1)
    assert [event.token_id for event in events] == generate(model, questions[2], 6)
    # At once, and the same prompt twice: several answers to one question.
    answers = events_of(engine, *((Prompt(ids), params) for ids in (*questions, questions[0])))
    assert [[event.token_id for event in events] for events in answers] == [
        generate(model, ids, 6) for ids in (*questions, questions[0])
    ]
    assert all(events[0].num_cached_tokens >= whole(shared) for events in answers)


def test_other_visual_tokens_share_nothing(kind: str) -> None:
    model, ids = tiny(), prompts(6)[5]
    visual = model.get_input_embeddings()(torch.tensor(ids[:30])).detach()
    other = visual.clone()
    other[20:] += 0.5
    engine, params = open_engine(kind, model, num_slots=2, max_length=64), SamplingParams(max_tokens=8)
    cached = []
    for tokens in (visual, other, visual, other):
        [events] = events_of(engine, (Prompt(ids, (tokens,)), params))
        cached.append(events[0].num_cached_tokens)
        inputs = TextCore(model).embed(torch.tensor(ids), [tokens])[None]
        expected = model.generate(inputs_embeds=inputs, max_new_tokens=8, do_sample=False)[0].tolist()
        assert [event.token_id for event in events] == expected
    assert cached[1] == 20 - 20 % SHARED_TOKENS[kind]


def test_a_dialogue_goes_on_from_its_own_answer(kind: str) -> None:
    model, ids = tiny(), prompts(2)[1]
    engine, params = open_engine(kind, model, num_slots=2, max_length=128), SamplingParams(max_tokens=9)
    [first] = run(engine, [(Prompt(ids), params)])
    longer = (*ids, *first, 11, 12, 13)
    [events] = events_of(engine, (Prompt(longer), params))
    assert [event.token_id for event in events] == generate(model, longer, 9)
    if kind in FINDS_ANSWERS:
        # The last token of an answer is never computed: nothing came after it.
        assert events[0].num_cached_tokens == len(ids) + 8


def assert_all_answers_are_those_of_a_solo_run(kind: str, model: PreTrainedModel, seed: int) -> int:
    """Random arrivals, lengths, shared beginnings and aborts; returns the prompt tokens that were not computed."""
    draw = random.Random(seed)
    stems = [tuple(draw.randrange(3, 97) for _ in range(length)) for length in (18, 40, 33)]
    stems.append((*stems[1], *stems[0]))
    engine = open_engine(
        kind, model, num_slots=draw.choice((1, 3, 6)), max_length=128, max_prefill_tokens=draw.choice((7, 25, 200))
    )
    asked: dict[str, tuple[tuple[int, ...], int]] = {}
    tokens: dict[str, list[int]] = {}
    aborted: dict[str, int] = {}
    num_cached = 0
    while len(asked) < 24 or engine.num_unfinished:
        for _ in range(draw.choice((0, 0, 1, 4)) if len(asked) < 24 else 0):
            stem = draw.choice(stems)
            ids = (
                *stem[: draw.randrange(1, len(stem) + 1)],
                *(draw.randrange(3, 97) for _ in range(draw.choice((0, 9)))),
            )
            name = f"r{len(asked)}"
            asked[name], tokens[name] = (ids, draw.randrange(1, 14)), []
            assert engine.add(Prompt(ids), SamplingParams(max_tokens=asked[name][1]), request_id=name) == name
        if asked and draw.random() < 0.15:
            name = draw.choice(list(asked))
            aborted.setdefault(name, len(tokens[name]))
            engine.abort(name)
        for event in engine.step():
            assert event.index == len(tokens[event.request_id])
            tokens[event.request_id].append(event.token_id)
            num_cached += event.num_cached_tokens if event.index == 0 else 0
    for name, (ids, count) in asked.items():
        expected = generate(model, ids, count)
        assert tokens[name] == expected[: aborted.get(name, count)], name
    return num_cached


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whatever_comes_and_goes_every_answer_is_that_of_a_solo_run(kind: str, family: str) -> None:
    model = tiny(family)
    assert sum(assert_all_answers_are_those_of_a_solo_run(kind, model, seed) for seed in range(3)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen2", "gemma2", "gemma3"])
def test_whatever_comes_and_goes_many_times(kind: str, family: str) -> None:
    model = tiny(family)
    model.set_attn_implementation("eager")  # on sdpa, gemma2's `generate` leaves out the cap on attention scores
    for seed in range(40):
        assert_all_answers_are_those_of_a_solo_run(kind, model, 100 + seed)
