"""Conversation → prompt exactly as the original's serving worker gets it: prompt style `upstream-serve`.

The text is that of its conversation templates (valley/conversation.py): "system###Human: question###Assistant:", with
the template's own opening turns where its system prompt is used. Use `chat.encode` where nothing has to match.
"""

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.chat.style import (
    Encoded,
    PromptOptions,
    check_asks,
    check_counts,
    fill_media_marks,
    fitting,
    no_training_form,
)
from valley_ray.chat.templates import ANSWER_END, PRESET_TURNS
from valley_ray.chat.tokens import Tokenizer, tokenize

STOP_STRINGS = (ANSWER_END,)

_NAME_OF_ROLE = {"user": "Human", "assistant": "Assistant"}


def template_text(conversation: Conversation, options: PromptOptions) -> str:
    """The prompt with its media marks as they are: what the original's client sends to the worker.

    Raises ConversationError where the last turn is not the user's.
    """
    check_asks(conversation)
    system = options.system_prompt if conversation.system is None else conversation.system
    turns = [*PRESET_TURNS.get(system, ()), *map(_named, conversation.turns)]
    return system + ANSWER_END + "".join(_turn_text(*turn) for turn in turns) + "Assistant:"


def prompt_text(conversation: Conversation, options: PromptOptions) -> str:
    """The prompt, visual blocks spelled out.

    Raises ConversationError where the last turn is not the user's, or marks and `num_frames` differ in number.
    """
    text = template_text(conversation, options)
    check_counts(Message("user", text).num_media, options)
    return fill_media_marks(text, num_patches=options.num_patches, num_frames=iter(options.num_frames))


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> tuple[int, ...]:
    """Tokens of `prompt_text`.

    Raises:
        ConversationError: as `prompt_text`.
        PromptTooLongError: more than `max_length` tokens (the original cuts their beginning off).
    """
    text = prompt_text(conversation, options)
    return fitting(tokenize(tokenizer, text, bos_token_id=options.bos_token_id(tokenizer)), options)


def encode_training(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> Encoded:
    """Raises ConfigError: this style only asks."""
    raise no_training_form("upstream-serve")


def clean_answer(text: str) -> str:
    """Without white space around it."""
    return text.strip()


def _named(message: Message) -> tuple[str, str]:
    return _NAME_OF_ROLE[message.role], message.content


def _turn_text(name: str, text: str) -> str:
    """An empty text leaves the name alone, as a cue."""
    return f"{name}: {text}{ANSWER_END}" if text else f"{name}:"
