"""Conversation → prompt exactly as the original's `completion` writes it: prompt style `upstream-build-inputs`.

The rules are those of valley/model/valley.py (build_inputs, process_response), its slips among them: turns of the user
without media are left out, every mark stands for eight frames whatever came, and the prompt ends with "###" instead of
a cue. Use `chat.encode` where nothing has to match.
"""

from valley_ray.chat.conversation import MEDIA_MARK, Conversation, Message
from valley_ray.chat.style import Encoded, PromptOptions, fitting, no_training_form
from valley_ray.chat.templates import ANSWER_END
from valley_ray.chat.tokens import Tokenizer, tokenize, visual_block
from valley_ray.errors import ConversationError

STOP_STRINGS = (ANSWER_END,)

_NUM_FRAMES = 8
"""Frame placeholders per mark."""
_NAME_OF_ROLE = {"user": "Human", "assistant": "Assistent"}
_ECHOES = (ANSWER_END, "Assistant:", "Response:", "Valley:")
"""Openings of an answer that are dropped, in this order, until none is left."""


def prompt_text(conversation: Conversation, options: PromptOptions) -> str:
    """The prompt; the header is left out where neither the conversation nor `options` has a system prompt.

    Raises ConversationError where no turn of the user holds a mark.
    """
    system = conversation.system
    if system is None:
        system = options.system_prompt or None
    header = "" if system is None else f"{system}\n\n{ANSWER_END}"
    written = [turn for turn in conversation.turns if turn.role == "assistant" or turn.num_media]
    if not any(turn.role == "user" for turn in written):
        raise ConversationError(
            "prompt_style 'upstream-build-inputs' asks about media only: put a <video> or <image> into a user message, "
            "or take the style 'valley'"
        )
    return header + "".join(_turn_text(turn, options.num_patches) for turn in written)


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> tuple[int, ...]:
    """Tokens of `prompt_text`; `num_frames` changes nothing.

    Raises:
        ConversationError: no turn of the user holds a mark.
        PromptTooLongError: more than `max_length` tokens.
    """
    text = prompt_text(conversation, options)
    return fitting(tokenize(tokenizer, text, bos_token_id=options.bos_token_id(tokenizer)), options)


def encode_training(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> Encoded:
    """Raises ConfigError: this style only asks."""
    raise no_training_form("upstream-build-inputs")


def clean_answer(text: str) -> str:
    """Echoes of the prompt in front dropped, cut at the first "###" behind them, white space stripped."""
    length = -1
    while length != len(text):
        length = len(text)
        text = text.strip()
        for echo in _ECHOES:
            text = text.removeprefix(echo).strip()
    return text.partition(ANSWER_END)[0].strip()


def _turn_text(turn: Message, num_patches: int) -> str:
    content = turn.content
    if turn.role == "user":
        content = MEDIA_MARK.sub(visual_block(num_patches=num_patches, num_frames=_NUM_FRAMES), content)
    return f" {_NAME_OF_ROLE[turn.role]}: {content} \n{ANSWER_END}"
