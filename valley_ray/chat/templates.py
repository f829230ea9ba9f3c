"""Prompt styles as data: which words surround a turn and how an answer ends. Says nothing about tokens."""

from dataclasses import dataclass
from typing import Literal

PromptStyle = Literal["valley", "upstream-train", "upstream-build-inputs", "upstream-serve"]
"""`valley` is ours and the default; the `upstream-` styles reproduce the 2023 code exactly:
its training, its `completion` in code, and its serving worker."""

ANSWER_END = "###"
"""By which every form of the original separates turns."""

SYSTEM_PROMPT_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""Upstream's conversation template `v1` (valley/conversation.py)."""

SYSTEM_PROMPT_VIDEO = (
    "You are Valley, a large language and vision assistant trained by ByteDance."
    "You are able to understand the visual content or video that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
"""Upstream's conversation template `multimodal_video`."""

SYSTEM_PROMPT_CHINESE = (
    "你是字节跳动训练的大型语言视觉助手 Chinese-Valley。"
    "你能够理解用户提供的视觉内容或视频，并使用自然语言协助用户完成各种任务。"  # noqa: RUF001
    "请仔细按照人类的指令进行回答，并详细解释你的答案。"  # noqa: RUF001
)
"""The system prompt that Chinese-Valley was made for (upstream's README, inference in the command line)."""

SYSTEM_PROMPTS = {"v1": SYSTEM_PROMPT_V1, "multimodal_video": SYSTEM_PROMPT_VIDEO, "chinese": SYSTEM_PROMPT_CHINESE}
"""By upstream's name of the template (its `conv_mode`); `chinese` is a name of ours."""

PRESET_TURNS: dict[str, tuple[tuple[str, str], ...]] = {
    SYSTEM_PROMPT_VIDEO: (("Human", "Hi!"), ("Assistant", "Hi there!  How can I help you today?\n"))
}
"""Turns that upstream's conversation template puts before the user's, as (name, text), by its system prompt."""


@dataclass(frozen=True)
class PromptTemplate:
    """Words around the turns: ``system + after_system``, then per turn ``before_turn + name + after_name + text``."""

    user: str = "Human"
    assistant: str = "Assistant"
    after_system: str = "\n\n"
    before_turn: str = "### "
    after_name: str = ":"
    end_of_turn: str = "\n"

    @property
    def cue(self) -> str:
        """What stands before an answer, in training and when answering."""
        return f"{self.before_turn}{self.assistant}{self.after_name}"


VALLEY = PromptTemplate()
"""The training form of the original (valley/util/data_util.py), used for training and answering alike."""
