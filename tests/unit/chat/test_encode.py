"""The style `valley`: prompts are prefixes of training sequences, labels are the answers, for any tokenizer."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from valley_ray.chat import Conversation, Encoded, Message, encode
from valley_ray.chat.style import PromptOptions
from valley_ray.chat.tokens import ADDED_TOKENS, added_token_ids, tokenize, visual_block
from valley_ray.errors import CheckpointError, ConversationError, PromptTooLongError

TEXTS = (
    "A chat between a curious human and an artificial intelligence assistant.",
    "### Human: What is moving? ### Assistant: A red circle moves left.",
    "Why? Because it was pushed. First it waits, then it leaves: 12 seconds.",
)
OPTIONS = {"system_prompt": "Answer about the video.", "num_patches": 4, "max_length": 512}


def encode_training(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, **options: Any) -> Encoded:
    return encode.encode_training(tokenizer, conversation, PromptOptions(**options))


def encode_prompt(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, **options: Any) -> tuple[int, ...]:
    return encode.encode_prompt(tokenizer, conversation, PromptOptions(**options))


def word_level() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a space belongs to the word behind it, no begin token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def metaspace() -> PreTrainedTokenizerFast:
    """LLaMA's kind: a space is put in front of every piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def with_added_tokens(make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    tokenizer = make()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS])
    return tokenizer


@pytest.fixture(params=[word_level, byte_level, metaspace], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return with_added_tokens(request.param)


def video_question(*more: Message) -> Conversation:
    return Conversation((Message("user", "<video>\nWhat is moving?"), *more))


def test_prompt_is_a_prefix_of_the_training_sequence_at_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = ("A red circle moves left.", "Because it was pushed.", "")
    messages = [Message("user", "<video>\nWhat is moving?")]
    for question, answer in zip(("Why?", " First or <image> then? ", "What?"), answers, strict=True):
        num_frames = [3, 1][: Conversation(tuple(messages)).num_media]
        prompt = encode_prompt(tokenizer, Conversation(tuple(messages)), num_frames=num_frames, **OPTIONS)
        messages.append(Message("assistant", answer))
        training = encode_training(tokenizer, Conversation(tuple(messages)), num_frames=num_frames, **OPTIONS)
        assert tuple(training.input_ids[: len(prompt)]) == prompt
        learned = training.labels[len(prompt) :]
        np.testing.assert_array_equal(learned, training.input_ids[len(prompt) :])
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]).strip().lower() == spaced_like(tokenizer, answer)
        messages.append(Message("user", question))


def spaced_like(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """`text` as a word-level tokenizer spaces it; the others keep the spaces."""
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip().lower()


def test_only_answers_and_their_end_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = video_question(
        Message("assistant", "A red circle."), Message("user", "Why?"), Message("assistant", "Because it was pushed.")
    )
    encoded = encode_training(tokenizer, conversation, num_frames=[2], **OPTIONS)
    learned = encoded.labels != -100
    ends = np.flatnonzero(encoded.input_ids == tokenizer.eos_token_id)
    assert len(ends) == 2
    assert learned[ends].all()
    runs = np.flatnonzero(np.diff(learned.astype(int)) == 1)
    assert len(runs) == 2
    np.testing.assert_array_equal(encoded.labels[learned], encoded.input_ids[learned])
    assert encoded.num_label_tokens == learned.sum()
    assert learned.dtype == bool
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int64


def test_answer_tokens_are_those_of_the_answer_in_running_text() -> None:
    """The cut before an answer does not show: ids equal those of the whole text in one go."""
    for make in (byte_level, metaspace):
        tokenizer = with_added_tokens(make)
        conversation = Conversation((Message("user", "What is moving?"), Message("assistant", "A red circle.")))
        encoded = encode_training(tokenizer, conversation, num_frames=[], **OPTIONS)
        text = "Answer about the video.\n\n### Human: What is moving?\n### Assistant: A red circle."
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        assert encoded.input_ids.tolist()[:-1] == bos + tokenizer.encode(text, add_special_tokens=False)


def test_visual_block_holds_patches_then_frames(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = added_token_ids(tokenizer)
    prompt = encode_prompt(tokenizer, video_question(), num_frames=[3], **OPTIONS)
    start = prompt.index(ids.im_start)
    expected = (ids.im_start, *[ids.im_patch] * 4, ids.im_end, ids.vi_start, *[ids.vi_frame] * 3, ids.vi_end)
    assert prompt[start : start + len(expected)] == expected


def test_white_space_beside_the_seven_tokens_is_dropped_but_not_beside_others() -> None:
    tokenizer = with_added_tokens(byte_level)
    text = f"a \n{visual_block(num_patches=1, num_frames=1)}\n b <|end|> c"
    block = tokenizer.convert_tokens_to_ids(
        ["<im_start>", "<im_patch>", "<im_end>", "<vi_start>", "<vi_frame>", "<vi_end>"]
    )

    def pieces(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert tokenize(tokenizer, text) == [*pieces("a"), *block, *pieces("b "), tokenizer.eos_token_id, *pieces(" c")]


def test_overlong_text_is_cut_at_the_end_but_media_and_answers_are_not_lost(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    conversation = video_question(Message("assistant", "A red circle moves left."))
    whole = encode_training(tokenizer, conversation, num_frames=[2], **OPTIONS)
    length = len(whole.input_ids)
    cut = encode_training(tokenizer, conversation, num_frames=[2], **OPTIONS | {"max_length": length - 2})
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:-2])
    np.testing.assert_array_equal(cut.labels, whole.labels[:-2])
    with pytest.raises(PromptTooLongError, match="max_length"):
        encode_training(
            tokenizer,
            conversation,
            num_frames=[2],
            **OPTIONS | {"max_length": length - whole.num_label_tokens},
        )
    block_end = int(np.flatnonzero(whole.input_ids == added_token_ids(tokenizer).vi_end)[0])
    with pytest.raises(PromptTooLongError):
        encode_training(tokenizer, conversation, num_frames=[2], **OPTIONS | {"max_length": block_end})
    with pytest.raises(PromptTooLongError, match="shorten"):
        encode_prompt(tokenizer, video_question(), num_frames=[2], **OPTIONS | {"max_length": 10})


@pytest.mark.parametrize(
    ("conversation", "num_frames", "reason"),
    [
        (video_question(), [8], "assistant turn to learn from"),
        (video_question(Message("assistant", "x")), [], "1 <video>/<image> marks but 0"),
        (video_question(Message("assistant", "see <image>")), [8], "belong in user turns"),
        (Conversation((Message("user", "<im_patch>"), Message("assistant", "x"))), [], "reserved token <im_patch>"),
    ],
)
def test_conversations_that_cannot_be_learned_are_refused(
    conversation: Conversation, num_frames: list[int], reason: str
) -> None:
    with pytest.raises(ConversationError, match=reason):
        encode_training(with_added_tokens(word_level), conversation, num_frames=num_frames, **OPTIONS)


def test_prompt_must_end_with_the_users_turn() -> None:
    with pytest.raises(ConversationError, match="must be the user's"):
        encode_prompt(
            with_added_tokens(word_level), video_question(Message("assistant", "x")), num_frames=[1], **OPTIONS
        )


def test_empty_system_prompt_leaves_the_header_out() -> None:
    tokenizer = with_added_tokens(word_level)
    with_header = encode_prompt(tokenizer, video_question(), num_frames=[1], **OPTIONS)
    without = encode_prompt(tokenizer, video_question(), num_frames=[1], **OPTIONS | {"system_prompt": ""})
    assert without[0] == with_header[0] == tokenizer.bos_token_id
    assert with_header[-len(without) + 1 :] == without[1:]
    own = Conversation((Message("system", ""), *video_question().messages))
    assert encode_prompt(tokenizer, own, num_frames=[1], **OPTIONS) == without


def test_tokenizer_without_the_added_tokens_is_named() -> None:
    with pytest.raises(CheckpointError, match="lacks the added tokens \\[PAD\\], <vi_frame>"):
        added_token_ids(word_level())


def test_importing_chat_and_processor_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, valley_ray.processor, valley_ray.chat.sentencepiece; "
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
