"""Prompt styles as data: which words surround a turn and how an answer ends. Says nothing about tokens."""

from dataclasses import dataclass
from typing import Literal

PromptStyle = Literal["valley", "upstream-train"]
"""`valley` is ours and the default; the `upstream-` styles reproduce the 2023 code exactly."""

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

SYSTEM_PROMPTS = {"v1": SYSTEM_PROMPT_V1, "multimodal_video": SYSTEM_PROMPT_VIDEO}
"""By upstream's name of the template (its `conv_mode`)."""


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
