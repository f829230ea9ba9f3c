"""Prompts of the original's two ways to ask, and the cleaning of its answers, against those that it recorded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parity_answers import Answerer
from parity_model import stored_clips
from parity_set import ROOT, expand_ids, load_json

from valley_ray.assistant import Assistant
from valley_ray.chat.conversation import Conversation, Message, from_marked_messages
from valley_ray.chat.sentencepiece import SentencePieceTokenizer
from valley_ray.chat.style import PromptOptions
from valley_ray.chat.styles import STYLES
from valley_ray.chat.templates import SYSTEM_PROMPTS
from valley_ray.chat.tokens import IM_PATCH
from valley_ray.chat.upstream_serving import template_text
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.errors import ConversationError
from valley_ray.processor import ProcessorConfig, ValleyProcessor

NUM_FRAMES = 8
"""Frames of a video in the original's `completion`."""

ROLE_OF_NAME = {"Human": "user", "Assistant": "assistant"}


def completion_processor(recorded: dict[str, Any]) -> ValleyProcessor:
    """Writes prompts as the original's `completion` does; a list without a system message gets no header there."""
    prompts = [case["prompt"] for case in recorded["build_inputs"] if "prompt" in case]
    num_patches = min(prompt.count(IM_PATCH) // prompt.count("<im_start>") for prompt in prompts)
    return ValleyProcessor(
        SentencePieceTokenizer(min(path.parent for path in ROOT.glob("checkpoints/*/tokenizer.model"))),
        ProcessorConfig(prompt_style="upstream-build-inputs", num_patches=num_patches, system_prompt=""),
    )


def test_completion_prompts_and_ids_equal_the_recorded_ones() -> None:
    recorded = load_json("inference.json")
    processor = completion_processor(recorded)
    for case in recorded["build_inputs"]:
        if "prompt" not in case:
            continue
        conversation = from_marked_messages(case["messages"])
        # Whatever came, the original writes its own number of frames: 3 here must change nothing.
        num_frames = [3] * conversation.num_media
        assert processor.prompt_text(conversation, num_frames) == case["prompt"], case["id"]
        ids = list(processor.encode_prompt(conversation, num_frames))
        assert ids == expand_ids(case["input_ids_rle_slow"]), case["id"]


def test_messages_that_the_original_refuses_are_refused_but_for_the_role_assistant() -> None:
    recorded = load_json("inference.json")
    processor = completion_processor(recorded)
    for case in recorded["build_inputs"]:
        if "error" not in case:
            continue
        messages = case["messages"]
        roles = {message["role"] for message in messages}
        if "assistant" in roles and roles <= {"system", "user", "assistant", "assistent"}:
            renamed = [{**message, "role": message["role"].replace("assistant", "assistent")} for message in messages]
            expected = processor.prompt_text(from_marked_messages(renamed), [])
            assert processor.prompt_text(from_marked_messages(messages), []) == expected
            assert any(f" Assistent: {message['content']} \n" in expected for message in messages), case["id"]
            continue
        with pytest.raises(ConversationError):
            processor.encode_prompt(from_marked_messages(messages), [])


def test_answers_are_cleaned_as_recorded() -> None:
    recorded = load_json("inference.json")
    clean = STYLES["upstream-build-inputs"].clean_answer
    for case in recorded["process_response"]:
        assert clean(case["raw"]) == case["out"], case["raw"]
    batch = recorded.get("process_response_batch", {"raw": [], "out": []})
    assert [clean(raw) for raw in batch["raw"]] == batch["out"]


def test_serving_prompts_of_every_template_equal_the_recorded_ones() -> None:
    for case in load_json("inference.json")["conversation_prompts"]:
        *turns, (cue_name, no_text) = case["appended"]
        assert (ROLE_OF_NAME[cue_name], no_text) == ("assistant", None), "the prompt ends with a cue"
        conversation = Conversation(tuple(Message(ROLE_OF_NAME[name], text) for name, text in turns))
        options = PromptOptions(system_prompt=SYSTEM_PROMPTS[case["template"]], num_patches=1)
        assert template_text(conversation, options) == case["prompt"], case["template"]


def test_completions_equal_the_recorded_texts() -> None:
    for context, answerer, prompt, case in each_answer():
        if "gen_kwargs" in case and not case["gen_kwargs"].get("do_sample"):
            _, text = answerer.answer(prompt, max_tokens=case["gen_kwargs"]["max_new_tokens"])
            assert [text] == case["response"], context
        elif "response" in case:
            token_ids, text = answerer.with_settings(stop_strings=()).answer(prompt, max_tokens=len(case["new_ids"]))
            assert token_ids == case["new_ids"], context
            assert answerer.processor.decode_raw(token_ids) == case["raw"], context
            assert text == case["response"], context


def test_stop_words_end_answers_where_recorded_and_in_the_first_token_too_without_the_switch() -> None:
    for context, answerer, prompt, case in each_answer():
        if "keyword" not in case:
            continue
        answerer = answerer.with_settings(stop_strings=(case["keyword"],))
        max_tokens = len(case["new_ids"]) + 8
        token_ids, text = answerer.answer(prompt, max_tokens=max_tokens)
        assert token_ids == case["new_ids"], context
        assert text == STYLES["upstream-build-inputs"].clean_answer(case["raw"]), context
        first = next(
            length
            for length in range(1, len(token_ids) + 1)
            if case["keyword"] in answerer.processor.decode_raw(token_ids[:length])
        )
        token_ids, text = answerer.with_settings(stop_skips_first_token=False).answer(prompt, max_tokens=max_tokens)
        assert token_ids == case["new_ids"][:first], context
        assert text == case["raw"].partition(case["keyword"])[0].strip(), context


def test_every_checkpoint_answers_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = load_json("media.json")["image"]["file"]
    image = next(path for path in (ROOT / "media").rglob("*") if path.name == Path(name).name)
    monkeypatch.chdir(tmp_path)
    for folder in sorted(path for path in (ROOT / "checkpoints").resolve().iterdir() if path.is_dir()):
        with Assistant.from_pretrained(folder, num_slots=1) as assistant:
            answer = assistant.ask("What is moving?", image=image, params=SamplingParams(max_tokens=4))
            assert answer.token_ids, folder.name
            assert answer.num_prompt_tokens > assistant.processor.num_patches, folder.name


def each_answer() -> Iterator[tuple[str, Answerer, Prompt, dict[str, Any]]]:
    """Each recorded greedy answer with its prompt; the original is given the video whatever the messages say."""
    messages = {case["id"]: case["messages"] for case in load_json("inference.json")["build_inputs"]}
    for name, recorded in load_json("generate.json").items():
        answerer = Answerer(
            name,
            splice="upstream",
            prompt_style="upstream-build-inputs",
            stop_skips_first_token=True,
            system_prompt="",
        )
        for key, case in recorded.items():
            said = messages.get(case.get("messages", key))
            if said is not None and "eos_token_id" not in case:
                prompt = answerer.prompt(from_marked_messages(said), [stored_clips(name)[NUM_FRAMES]])
                yield f"{name} {key}", answerer, prompt, case
