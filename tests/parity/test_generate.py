"""Greedy answers of the original's checkpoints, by transformers' generate and by the engine."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from parity_model import has_variant, open_variant, stored_clips
from parity_set import expand_ids, load_json

from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.model import ValleyForConditionalGeneration

ATOL, RTOL = 1e-3, 1e-4
"""Of logits (the set's README)."""


def each_case() -> Iterator[tuple[str, ValleyForConditionalGeneration, list[tuple[dict[str, Any], list[int], int]]]]:
    """Checkpoint, model and (recorded answer, prompt ids, end token) of its cases without a stop word."""
    prompts = {
        case["id"]: expand_ids(case["input_ids_rle_slow"])
        for case in load_json("inference.json")["build_inputs"]
        if "input_ids_rle_slow" in case
    }
    for name, recorded in load_json("generate.json").items():
        if not has_variant(name):
            continue
        model = open_variant(name, splice="upstream")
        own_end = model.generation_config.eos_token_id
        cases = [
            (case, prompts[case.get("messages", key)], case.get("eos_token_id", own_end))
            for key, case in recorded.items()
            if "new_ids" in case and "keyword" not in case and case.get("messages", key) in prompts
        ]
        if cases:
            yield name, model, cases


@torch.no_grad()
def test_generate_gives_the_recorded_tokens() -> None:
    for name, model, cases in each_case():
        features = model.encode_clips([the_video(name, model, cases)])
        for case, prompt, end in cases:
            made = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                features=features,
                do_sample=False,
                max_new_tokens=most_new_tokens(cases),
                eos_token_id=end,
            )
            assert made[0, len(prompt) :].tolist() == case["new_ids"], (name, case)


def test_the_engine_gives_the_recorded_tokens_all_cases_at_once() -> None:
    for name, model, cases in each_case():
        tokens = visual_tokens(model, the_video(name, model, cases))
        engine = SlotEngine(model.core)
        made: dict[str, list[int]] = {}
        for _, prompt, end in cases:
            params = SamplingParams(max_tokens=most_new_tokens(cases), stop_token_ids=(end,))
            made[engine.add(Prompt(tuple(prompt), (tokens,)), params)] = []
        while engine.num_unfinished:
            for event in engine.step():
                made[event.request_id].append(event.token_id)
        for (case, _, _), new_ids in zip(cases, made.values(), strict=True):
            assert new_ids == case["new_ids"], (name, case)


@torch.no_grad()
def test_the_first_step_ranks_tokens_as_recorded() -> None:
    for name, model, cases in each_case():
        features = model.encode_clips([the_video(name, model, cases)])
        for case, prompt, _ in cases:
            if "first_step_top5" not in case:
                continue
            assert len(prompt) == case["prompt_len"]
            ids, values = case["first_step_top5"]
            logits = model(torch.tensor([prompt]), features=features).logits[0, -1]
            np.testing.assert_allclose(logits[ids].numpy(), values, atol=ATOL, rtol=RTOL, err_msg=name)
            np.testing.assert_allclose(logits.topk(len(ids)).values.numpy(), values, atol=ATOL, rtol=RTOL)


@torch.no_grad()
def visual_tokens(model: ValleyForConditionalGeneration, video: torch.Tensor) -> torch.Tensor:
    """As a server hands them to the engine."""
    (features,) = model.encode_clips([video])
    return model.core.visual_tokens(features)


def the_video(
    name: str, model: ValleyForConditionalGeneration, cases: list[tuple[dict[str, Any], list[int], int]]
) -> torch.Tensor:
    """What the original was given also for an image: the video of as many frames as build_inputs writes per mark."""
    prompt = cases[0][1]
    num_marks = prompt.count(model.config.vi_start_token_id)
    return stored_clips(name)[prompt.count(model.config.vi_frame_token_id) // num_marks]


def most_new_tokens(cases: list[tuple[dict[str, Any], list[int], int]]) -> int:
    """The recording's limit: answers that found no end token are as long."""
    return max(len(case["new_ids"]) for case, _, _ in cases)
