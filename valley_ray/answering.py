"""What the assistant and the server share: media become visual tokens, tokens become prompts and text deltas.

Works on an opened model and processor. Knows neither where requests come from nor what schedules them.
T frames, P patch tokens, S crop side, D hidden width of the language model.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from valley_ray.chat.conversation import Conversation
from valley_ray.engine.engine import Prompt, SamplingParams, TokenEvent
from valley_ray.errors import CheckpointError, ConversationError
from valley_ray.media.preprocess import check_one_size
from valley_ray.model.adapters import CoreAdapter
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor

_UNSETTLED = re.compile(r"\s*[!-~]*\ufffd*\s*$")
"""End of a text that further tokens may still change: a word in progress, the space before it, half a character."""


def load_model(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    splice: str | None = None,
    allow_bin: bool = True,
    base: str | Path | None = None,
    keep: Literal["all", "vision", "language"] = "all",
) -> ValleyForConditionalGeneration:
    """Open the weights of a model folder for inference; `dtype` None means float32 on a CPU, else the folder's own.

    `keep` "vision" drops the language model and "language" the tower before anything goes to the device. `splice`,
    `allow_bin` and `base` are those of `ValleyForConditionalGeneration.from_pretrained`. Raises CheckpointError where
    the folder cannot be opened.
    """
    if dtype is None and device == "cpu":
        dtype = torch.float32
    model = ValleyForConditionalGeneration.from_pretrained(
        folder, dtype=dtype or "auto", splice=splice, allow_bin=allow_bin, base=base
    )
    if keep == "vision":
        del model.core.language_model
    elif keep == "language":
        del model.vision_tower
    model.to(device).eval()
    return model


def check_fit(config: ValleyConfig, processor: ValleyProcessor) -> None:
    """Raise CheckpointError where model and processor disagree: answers would be wrong without any other sign.

    ConfigError where the processor's crops give frames of many sizes.
    """
    check_one_size(video_crop=processor.video_crop, image_crop=processor.image_crop)
    sides = {processor.video_crop.size, processor.image_crop.size}
    if sides != {config.image_size}:
        raise CheckpointError(f"processor_config.json crops to {sorted(sides)}, the tower takes {config.image_size}")
    if processor.num_patches != config.num_patches:
        raise CheckpointError(
            f"processor_config.json has num_patches={processor.num_patches}, the tower makes {config.num_patches}"
        )
    ids = processor.tokenizer.get_added_vocab()
    for token, field in ID_FIELD_OF_TOKEN.items():
        if ids[token] != getattr(config, field):
            raise CheckpointError(
                f"{token} is {ids[token]} in the tokenizer but config.json has {field}={getattr(config, field)}; "
                "use the tokenizer saved with the model"
            )


@torch.inference_mode()
def encode_visual_tokens(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor, clips: Sequence[npt.NDArray[np.uint8]]
) -> list[torch.Tensor]:
    """Cropped frames uint8 [T, S, S, 3] per clip → visual tokens [P + T, D] per clip; one pass of the tower for all."""
    return [model.core.visual_tokens(one) for one in encode_features(model, processor, clips)]


@torch.inference_mode()
def encode_features(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor, clips: Sequence[npt.NDArray[np.uint8]]
) -> list[torch.Tensor]:
    """Cropped frames uint8 [T, S, S, 3] per clip → what the visual tokens of any adapter are made of, per clip."""
    device = next(model.parameters()).device
    features = model.encode_clips([processor.pixel_values(clip).to(device) for clip in clips])
    return [model.core.pooling.kept(one) for one in features]


def build_prompt(
    processor: ValleyProcessor,
    conversation: Conversation,
    visual_tokens: Sequence[torch.Tensor],
    *,
    adapter: CoreAdapter | None = None,
) -> Prompt:
    """Tokenize around the media: one [P + T, D] tensor per mark of the conversation, in order, of `adapter`'s making.

    Raises ConversationError or PromptTooLongError as `ValleyProcessor.encode_prompt`.
    """
    num_frames = [len(tokens) - processor.num_patches for tokens in visual_tokens]
    return Prompt(tuple(processor.encode_prompt(conversation, num_frames)), tuple(visual_tokens), adapter)


def complete_params(
    processor: ValleyProcessor, params: SamplingParams, prompt: Prompt, *, fit_into: int | None
) -> SamplingParams:
    """Stop at the model's end tokens where `params` names none; lower `max_tokens` to what fits into `fit_into` tokens.

    `fit_into` None is for callers who named a number of tokens: what does not fit is then refused by the engine.
    """
    stop = params.stop_token_ids or tuple(processor.stop_token_ids)
    room = params.max_tokens if fit_into is None else max(1, fit_into - len(prompt.input_ids))
    return replace(params, stop_token_ids=stop, max_tokens=min(params.max_tokens, room))


class TextStream:
    """Tokens become text deltas that are never contradicted: their concatenation is the text of the whole answer.

    A word in progress, an incomplete UTF-8 character and what may become a stop string are held back until a later
    token settles them; nothing of a stop string or after it is ever sent.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        *,
        skip_first_token: bool = False,
        clean: Callable[[str], str] = str.strip,
    ) -> None:
        """Set up for one answer.

        Args:
            decode: token ids → their text, neither cut nor stripped.
            stop_token_ids: tokens that end an answer and are no text.
            stop_strings: texts that end an answer, wherever tokens cut them.
            skip_first_token: upstream's rule (valley/util/data_util.py, KeywordsStoppingCriteria): the search starts
                with the second token, and what it finds stays in the text that `clean` gets.
            clean: text of the answer so far → what is shown of it.
        """
        self._decode, self._stop_token_ids, self._clean = decode, stop_token_ids, clean
        self._stop_strings, self._skip_first_token = tuple(stop_strings), skip_first_token
        self._token_ids: list[int] = []
        self._num_pushed = 0
        self._sent = ""
        self.stopped = False
        """A stop string came: the request has to be aborted, its finish reason is "stop"."""

    def push(self, event: TokenEvent) -> str:
        """The text that became certain with this token; with the last token, all the rest."""
        assert not self.stopped, "the answer has ended with a stop string"
        self._num_pushed += 1
        if event.token_id not in self._stop_token_ids:
            self._token_ids.append(event.token_id)
        text = self._decode(self._token_ids)
        found = [position for stop in self._stop_strings if (position := text.find(stop)) >= 0]
        self.stopped = bool(found) and (self._num_pushed > 1 or not self._skip_first_token)
        if self.stopped and not self._skip_first_token:
            text = text[: min(found)]
        elif not self.stopped and event.finish_reason is None:
            text = self._settled(text)
        text = self._clean(text)
        if not text.startswith(self._sent):
            return ""  # a tokenizer that rewrites settled text: what was sent stands
        delta = text[len(self._sent) :]
        self._sent = text
        return delta

    @property
    def text(self) -> str:
        """All deltas so far."""
        return self._sent

    def _settled(self, text: str) -> str:
        """The part that no further token changes and that is no beginning of a stop string."""
        whole_characters = text.rstrip("\ufffd")
        num_held_back = max((_overlap(whole_characters, stop) for stop in self._stop_strings), default=0)
        end = len(whole_characters) - num_held_back
        return text[: min(end, len(_UNSETTLED.sub("", text)))]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((length for length in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:length])), 0)


def open_text_stream(processor: ValleyProcessor, params: SamplingParams, stop: str | Sequence[str] = ()) -> TextStream:
    """The text of one answer: it ends with the processor's own stop strings or `stop`, one text or several.

    Raises ConversationError for an empty stop text, which every answer has at its beginning.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise ConversationError("a stop text is empty, so every answer would be; name some text or leave it out")
    return TextStream(
        processor.decode_raw,
        params.stop_token_ids,
        (*processor.stop_strings, *stops),
        skip_first_token=processor.config.stop_skips_first_token,
        clean=processor.clean_answer,
    )
