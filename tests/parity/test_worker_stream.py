"""What the original's serving worker streamed, from the prompts that it was sent."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from parity_answers import Answerer
from parity_model import stored_clips
from parity_set import ROOT, load_json

from valley_ray.chat.conversation import MEDIA_MARK, Conversation, Message
from valley_ray.chat.style import PromptOptions
from valley_ray.chat.templates import ANSWER_END, PRESET_TURNS
from valley_ray.chat.upstream_serving import template_text
from valley_ray.engine.engine import Prompt
from valley_ray.media import decode

NUM_FRAMES = 8
CONTEXT, MARGIN = 2048, 8
"""Fixed in the worker: frames of a video; tokens of a prompt and its answer, and those left free."""

ROLE_OF_NAME = {"Human": "user", "Assistant": "assistant"}


def each_request() -> Iterator[tuple[str, Answerer, dict[str, Any]]]:
    """Name, checkpoint and recorded stream of every request."""
    for name, recorded in load_json("worker_stream.json").items():
        has_frame_tokens = recorded.get("vision_config_has", {}).get("vi_frame_token", False)
        splice = "upstream" if has_frame_tokens else "upstream-serve"
        answerer = Answerer(name, splice=splice, prompt_style="upstream-serve")
        for key, case in recorded.items():
            if "request" in case:
                yield f"{name} {key}", answerer, case


def test_every_chunk_equals_the_recorded_one() -> None:
    for context, answerer, case in each_request():
        request = case["request"]
        if "stop" not in request:
            continue
        token_ids = greedy_tokens(answerer, request)
        texts = [chunk["text_after_prompt"] for chunk in case["chunks"]]
        assert worker_chunks(answerer, token_ids, request["stop"], case["stream_interval"]) == texts, context


def test_a_request_without_a_stop_string_is_answered() -> None:
    """The original fails with a TypeError."""
    for context, answerer, case in each_request():
        request = case["request"]
        if "stop" in request:
            continue
        conversation = conversation_of(request["prompt"])
        prompt = answerer.prompt(conversation, clips_of(answerer, request))
        token_ids, text = answerer.with_settings(stop_strings=()).answer(prompt, max_tokens=request["max_new_tokens"])
        assert len(token_ids) == request["max_new_tokens"], context
        assert text, context


def test_our_stream_ends_where_the_stop_string_first_begins() -> None:
    for context, answerer, case in each_request():
        request = case["request"]
        if "stop" not in request:
            continue
        prompt = answerer.prompt(conversation_of(request["prompt"]), clips_of(answerer, request))
        token_ids = greedy_tokens(answerer, request)
        without_own_stop = answerer.with_settings(stop_strings=())
        made, text = without_own_stop.answer(prompt, max_tokens=len(token_ids), stop=[request["stop"]])
        whole = answerer.processor.decode_raw(token_ids)
        assert text == whole.partition(request["stop"])[0].strip(), context
        assert made == token_ids[: len(made)], context
        assert request["stop"] not in answerer.processor.decode_raw(made[:-1]), context


def greedy_tokens(answerer: Answerer, request: dict[str, Any]) -> list[int]:
    """Tokens up to the limit, whatever text they make."""
    prompt = answerer.prompt(conversation_of(request["prompt"]), clips_of(answerer, request))
    room = CONTEXT - request["max_new_tokens"] - MARGIN
    prompt = Prompt(prompt.input_ids[-room:], prompt.visual_tokens)
    return answerer.with_settings(stop_strings=()).answer(prompt, max_tokens=request["max_new_tokens"])[0]


def worker_chunks(answerer: Answerer, token_ids: Sequence[int], stop: str, interval: int) -> list[str]:
    """The worker's rule for what it sends: every `interval` steps and at the last, cut at the last `stop`.

    A stop string never is a single token there, since its ids begin with the begin token.
    """
    chunks = []
    for step, token in enumerate(token_ids):
        is_end = token == answerer.processor.tokenizer.eos_token_id
        if step % interval and step != len(token_ids) - 1 and not is_end:
            continue
        text = answerer.processor.decode_raw(token_ids[: step + 1])
        before, found, _ = text.rpartition(stop)
        chunks.append(before if found else text)
        if found or is_end:
            break
    return chunks


def conversation_of(prompt: str) -> Conversation:
    """The turns of a prompt of the original's template; written again they must give it."""
    system, *turns, cue = prompt.split(ANSWER_END)
    assert ROLE_OF_NAME[cue.removesuffix(":")] == "assistant"
    named = [turn.partition(": ") for turn in turns[len(PRESET_TURNS.get(system, ())) :]]
    messages = [Message(ROLE_OF_NAME[name], text) for name, _, text in named]
    conversation = Conversation((Message("system", system), *messages))
    assert template_text(conversation, PromptOptions(system_prompt="", num_patches=1)) == prompt
    return conversation


def clips_of(answerer: Answerer, request: dict[str, Any]) -> list[torch.Tensor]:
    """Pixels as the worker had them: its image stays float32, its video is rounded to float16."""
    kinds = MEDIA_MARK.findall(request["prompt"])
    images = [image_pixels(answerer, named) for named in request.get("images", [])]
    videos = [stored_clips(answerer.name)[NUM_FRAMES] for _ in request.get("videos", [])]
    assert len(kinds) == len(images) + len(videos)
    return [images.pop(0) if kind == "<image>" else videos.pop(0) for kind in kinds]


def image_pixels(answerer: Answerer, named: str) -> torch.Tensor:
    """[1, 3, S, S] of the media file whose name the recording has in place of its bytes."""
    (path,) = [path for path in (ROOT / "media").rglob("*") if path.is_file() and path.name in named]
    sampling, crop = answerer.processor.config.media_plan("image")
    return answerer.processor.pixel_values(decode.frames(path, sampling, crop=crop).frames_THWC)
