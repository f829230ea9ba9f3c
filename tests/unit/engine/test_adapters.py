"""An adapter per request in one engine, against `generate` of each adapter's folder, merged."""

import gc
import weakref
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from engine_cases import run
from tiny import make_tiny_valley
from tiny_adapters import make_adapter

from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.adapters import CoreAdapter, open_adapter

LENGTH = 14


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_valley(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {
        "base": base,
        "red": make_adapter(base, base.parent / "red", seed=1, r=4),
        "blue": make_adapter(base, base.parent / "blue", seed=2, r=8, use_dora=True),
        "bare": make_adapter(base, base.parent / "bare", seed=3, r=2, moved=(), adapter_only=True),
    }


def opened(folder: Path) -> ValleyForConditionalGeneration:
    model: ValleyForConditionalGeneration = ValleyForConditionalGeneration.from_pretrained(folder)
    return model.eval()


def clip(seed: int, num_frames: int = 3) -> torch.Tensor:
    return torch.randn(num_frames, 17, 32, generator=torch.Generator().manual_seed(seed))


def input_ids(model: ValleyForConditionalGeneration, question: Sequence[int], num_frames: int = 3) -> tuple[int, ...]:
    config = model.config
    block = [config.vi_start_token_id, *[config.vi_frame_token_id] * num_frames, config.vi_end_token_id]
    patches = [config.im_start_token_id, *[config.im_patch_token_id] * config.num_patches, config.im_end_token_id]
    return (1, *patches, *block, *question)


@torch.no_grad()
def expected(folder: Path, question: Sequence[int], seed: int) -> list[int]:
    """What the merged folder writes."""
    model = opened(folder)
    ids = torch.tensor([input_ids(model, question)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        features=[clip(seed)],
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, ids.shape[1] :].tolist()


@torch.no_grad()
def prompt(
    model: ValleyForConditionalGeneration, adapter: CoreAdapter | None, question: Sequence[int], seed: int
) -> Prompt:
    core = model.core if adapter is None else adapter.core
    return Prompt(input_ids(model, question), (core.visual_tokens(clip(seed)),), adapter)


QUESTIONS = ((5, 6, 7), (8, 9), (10, 5, 11, 12))


def test_base_and_adapters_answer_together_as_their_merged_folders_do(folders: dict[str, Path]) -> None:
    model = opened(folders["base"])
    adapters = {name: open_adapter(model.core, folder) for name, folder in folders.items() if name != "base"}
    asked = [(name, question, seed) for seed, question in enumerate(QUESTIONS) for name in folders]
    wanted = [expected(folders[name], question, seed) for name, question, seed in asked]
    assert len({tuple(one) for one in wanted}) == len(asked), "the test needs answers that differ"
    params = SamplingParams(max_tokens=LENGTH)
    # Prompts in chunks, rows that change places, packed weights and plain ones.
    for options in ({"max_prefill_tokens": 20}, {"pack_weights": False}):
        engine = SlotEngine(model.core, num_slots=5, max_length=128, **options)
        requests = [(prompt(model, adapters.get(name), *rest), params) for name, *rest in asked]
        assert run(engine, requests) == wanted
        assert run(engine, requests[::-1]) == wanted[::-1]


def test_the_base_answers_bit_for_bit_before_beside_and_after_adapters(folders: dict[str, Path]) -> None:
    model = opened(folders["base"])
    engine = SlotEngine(model.core, num_slots=2, max_length=128)
    asked = prompt(model, None, QUESTIONS[0], 0), SamplingParams(max_tokens=LENGTH, logprobs=5)

    def answered() -> list[tuple[int, float | None, object]]:
        request_id = engine.add(*asked)
        events = []
        while engine.num_unfinished:
            events += [one for one in engine.step() if one.request_id == request_id]
        return [(one.token_id, one.logprob, one.top_logprobs) for one in events]

    answered()  # from here on its prompt is in the cache
    before = answered()
    red = open_adapter(model.core, folders["red"])
    run(engine, [(prompt(model, red, QUESTIONS[0], 0), SamplingParams(max_tokens=3))])
    assert answered() == before
    engine.add(prompt(model, red, QUESTIONS[1], 0), SamplingParams(max_tokens=LENGTH))
    assert [token for token, *_ in answered()] == [token for token, *_ in before]


def test_equal_prompts_of_two_adapters_share_nothing_in_the_cache(base: Path, tmp_path: Path) -> None:
    """Same projector and table: embeddings are equal, keys and values are not."""
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed, moved=(), adapter_only=True) for seed in (1, 2)]
    model = opened(base)
    engine = SlotEngine(model.core, num_slots=4, max_length=128)
    adapters = [None, *(open_adapter(model.core, folder) for folder in folders)]
    params = SamplingParams(max_tokens=LENGTH)
    wanted = [expected(folder, QUESTIONS[0], 0) for folder in (base, *folders)]
    for adapter, answer in zip(adapters, wanted, strict=True):
        assert run(engine, [(prompt(model, adapter, QUESTIONS[0], 0), params)]) == [answer]
    assert engine.num_cached_tokens == 0
    again = [(prompt(model, adapter, QUESTIONS[0], 0), params) for adapter in adapters]
    assert run(engine, again) == wanted
    assert engine.num_cached_tokens == sum(len(one.input_ids) - 1 for one, _ in again)
    # Together, in an engine that has seen none of them.
    engine = SlotEngine(model.core, num_slots=4, max_length=128)
    assert run(engine, again) == wanted
    assert engine.num_cached_tokens == 0


def test_what_an_answer_leaves_in_the_cache_continues_the_same_adapter_alone(folders: dict[str, Path]) -> None:
    model = opened(folders["base"])
    engine = SlotEngine(model.core, num_slots=4, max_length=128)
    red = open_adapter(model.core, folders["red"])
    first = prompt(model, red, QUESTIONS[0], 0)
    [answer] = run(engine, [(first, SamplingParams(max_tokens=LENGTH))])
    longer = (*QUESTIONS[0], *answer, 5)
    for adapter, cached in ((None, 0), (red, len(first.input_ids) + LENGTH - 1)):
        before = engine.num_cached_tokens
        run(engine, [(prompt(model, adapter, longer, 0), SamplingParams(max_tokens=2))])
        assert engine.num_cached_tokens - before == cached


def test_a_token_table_of_its_own_is_the_head_too_where_the_model_ties_them(base: Path, tmp_path: Path) -> None:
    config = deepcopy(opened(base).config)
    config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = ValleyForConditionalGeneration(config).eval()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    tied.save_pretrained(tmp_path / "tied")
    folder = make_adapter(tmp_path / "tied", tmp_path / "red", seed=1)
    model = opened(tmp_path / "tied")
    engine = SlotEngine(model.core, num_slots=4, max_length=128)
    params = SamplingParams(max_tokens=LENGTH)
    adapters = (None, open_adapter(model.core, folder))
    requests = [(prompt(model, one, question, 0), params) for question in QUESTIONS for one in adapters]
    wanted = [expected(one, question, 0) for question in QUESTIONS for one in (tmp_path / "tied", folder)]
    assert run(engine, requests) == wanted


def test_nothing_of_an_adapter_stays_after_its_last_request(folders: dict[str, Path]) -> None:
    model = opened(folders["base"])
    engine = SlotEngine(model.core, num_slots=2, max_length=128)
    adapter = open_adapter(model.core, folders["red"])
    left = weakref.ref(adapter), weakref.ref(next(iter(adapter.updates.values())).tensors[0])
    run(engine, [(prompt(model, adapter, QUESTIONS[0], 0), SamplingParams(max_tokens=3))])
    del adapter
    gc.collect()
    assert [one() for one in left] == [None, None]
