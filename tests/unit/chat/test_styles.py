"""The upstream styles where no recording reaches: mistakes, switches, and what all styles have in common."""

from typing import get_args

import pytest
from tiny import make_tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from valley_ray.chat import Conversation, Message
from valley_ray.chat.style import PromptOptions, Style
from valley_ray.chat.styles import STYLES
from valley_ray.chat.templates import PRESET_TURNS, SYSTEM_PROMPT_VIDEO, SYSTEM_PROMPTS, PromptStyle
from valley_ray.chat.tokens import ADDED_TOKENS, visual_block
from valley_ray.errors import ConfigError, ConversationError, PromptTooLongError

ASKED = Conversation((Message("user", "<video>\nWhat is moving?"),))
ANSWERED = Conversation((*ASKED.messages, Message("assistant", "A circle."), Message("user", "Why?")))
BLOCK = visual_block(num_patches=2, num_frames=3)


def options(**changes: object) -> PromptOptions:
    values = {"system_prompt": "Be brief.", "num_patches": 2, "num_frames": [3], "max_length": 512}
    return PromptOptions(**(values | changes))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS])
    return tokenizer


@pytest.fixture(params=get_args(PromptStyle))
def style(request: pytest.FixtureRequest) -> Style:
    return STYLES[request.param]


def test_the_text_of_every_style_is_what_its_tokens_say(style: Style, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = style.encode_prompt(tokenizer, ASKED, options())
    text = style.prompt_text(ASKED, options())
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    with_end = style.encode_prompt(tokenizer, ASKED, options(bos_token="eos"))
    assert with_end == (tokenizer.eos_token_id, *ids[1:])


def test_a_prompt_that_does_not_fit_is_refused_by_every_style(style: Style, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptTooLongError, match="model takes 5"):
        style.encode_prompt(tokenizer, ASKED, options(max_length=5))


def test_texts_of_the_styles() -> None:
    eight = visual_block(num_patches=2, num_frames=8)
    asked, answer = "What is moving?", "A circle."
    training_form = (
        f"Be brief.\n\n### Human: {BLOCK}\n{asked}\n### Assistant: {answer}\n### Human: Why?\n### Assistant:"
    )
    assert {name: one.prompt_text(ANSWERED, options()) for name, one in STYLES.items()} == {
        "valley": training_form,
        "upstream-train": training_form,
        "upstream-build-inputs": f"Be brief.\n\n### Human: {eight}\n{asked} \n### Assistent: {answer} \n###",
        "upstream-serve": f"Be brief.###Human: {BLOCK}\n{asked}###Assistant: {answer}###Human: Why?###Assistant:",
    }


def test_the_styles_that_only_ask_have_no_training_form(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("upstream-build-inputs", "upstream-serve"):
        with pytest.raises(ConfigError, match=f"'{name}' has no training form"):
            STYLES[name].encode_training(tokenizer, ANSWERED, options())


def test_styles_that_count_media_refuse_other_counts() -> None:
    for name in ("valley", "upstream-train", "upstream-serve"):
        with pytest.raises(ConversationError, match="1 <video>/<image> marks but 2 pieces"):
            STYLES[name].prompt_text(ASKED, options(num_frames=[3, 1]))
        with pytest.raises(ConversationError, match="last message must be the user's"):
            STYLES[name].prompt_text(Conversation(ANSWERED.messages[:2]), options())


def test_build_inputs_needs_media_and_writes_a_header_only_where_there_is_one() -> None:
    build_inputs = STYLES["upstream-build-inputs"]
    with pytest.raises(ConversationError, match="put a <video> or <image>"):
        build_inputs.prompt_text(Conversation((Message("user", "Why?"),)), options(num_frames=[]))
    assert build_inputs.prompt_text(ASKED, options(system_prompt="")).startswith(" Human: ")
    own = Conversation((Message("system", ""), *ASKED.messages))
    assert build_inputs.prompt_text(own, options()).startswith("\n\n### Human: ")


def test_serving_puts_the_templates_own_turns_behind_its_system_prompt() -> None:
    text = STYLES["upstream-serve"].prompt_text(ASKED, options(system_prompt=SYSTEM_PROMPT_VIDEO))
    assert text.startswith(f"{SYSTEM_PROMPT_VIDEO}###Human: Hi!###Assistant: Hi there!")
    assert set(PRESET_TURNS) < set(SYSTEM_PROMPTS.values())


def test_only_mask_system_learns_the_users_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    train = STYLES["upstream-train"]
    masked = train.encode_training(tokenizer, ANSWERED, options())
    learned = train.encode_training(tokenizer, ANSWERED, options(only_mask_system=True))
    assert (masked.input_ids == learned.input_ids).all()
    assert masked.num_label_tokens < learned.num_label_tokens < len(learned.input_ids)
