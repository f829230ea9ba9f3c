"""The assistant against Hugging Face `generate` on the tiny model, with real small videos."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clips import write_clip
from PIL import Image

from valley_ray.assistant import AskInput, Assistant
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import ConfigError, ConversationError, MediaError, PromptTooLongError, SourceNotFoundError
from valley_ray.media.sampling import FrameSampling

QUESTION = "What is moving?"
PARAMS = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def assistant(tiny_valley: Path) -> Iterator[Assistant]:
    with Assistant.from_pretrained(tiny_valley, num_slots=3) as opened:
        yield opened


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{seed}.mp4", seed=seed) for seed in range(3)]


def generated(assistant: Assistant, ask: AskInput) -> list[int]:
    """New tokens by `generate` from frames decoded here again, sampled and cropped by the processor's rules."""
    from valley_ray.media.decode import frames
    from valley_ray.media.preprocess import resize_and_crop

    processor = assistant.processor
    conversation, media = ask.conversation()
    pixel_values = []
    for part in media:
        is_image = part.kind == "image"
        sampling = FrameSampling(num_frames=1) if is_image else (ask.sampling or processor.sampling)
        crop = processor.image_crop if is_image else processor.video_crop
        pixel_values.append(processor.pixel_values(resize_and_crop(frames(Path(part.url), sampling).frames_THWC, crop)))
    input_ids = torch.tensor([processor.encode_prompt(conversation, [len(one) for one in pixel_values])])
    output = assistant.model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixel_values or None,
        max_new_tokens=(ask.params or PARAMS).max_tokens,
        do_sample=False,
        eos_token_id=list(processor.stop_token_ids),
    )
    return output[0, input_ids.shape[1] :].tolist()


def test_answers_equal_generate_alone_and_in_a_batch(assistant: Assistant, clips: list[Path], tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.linear_gradient("L").convert("RGB").save(image)
    asks = [
        *(AskInput(QUESTION, video=clip, params=PARAMS) for clip in clips),
        AskInput("How many shapes do you see?", video=clips[0], params=SamplingParams(max_tokens=5)),
        AskInput(QUESTION, video=clips[1], sampling=FrameSampling(num_frames=2), params=PARAMS),
        AskInput("Describe the clip", image=image, params=PARAMS),
        AskInput("Describe the clip", video=clips[2], image=image, params=PARAMS),
        AskInput("yes no", params=PARAMS, system_prompt="Describe"),
    ]
    expected = [generated(assistant, ask) for ask in asks]
    batch = assistant.answer_batch(asks)
    assert [list(answer.token_ids) for answer in batch] == expected
    assert len({answer.token_ids for answer in batch}) > 4, "the questions must not all have one answer"
    assert [answer.text for answer in batch] == [assistant.processor.decode(ids) for ids in expected]
    alone = assistant.ask(QUESTION, video=clips[0], params=PARAMS)
    assert alone == batch[0]


def test_an_image_is_one_frame_with_its_own_crop(assistant: Assistant) -> None:
    processor = assistant.processor.config
    wanted = FrameSampling(fps=2.0)
    assert processor.media_plan("image", wanted) == (FrameSampling(num_frames=1), processor.image_crop)
    assert processor.media_plan("video", wanted) == (wanted, processor.video_crop)
    assert processor.media_plan("video") == (processor.sampling, processor.video_crop)
    assert processor.image_crop != processor.video_crop


def test_stream_joins_to_the_answer(assistant: Assistant, clips: list[Path]) -> None:
    answer = assistant.ask(QUESTION, video=clips[0], params=PARAMS)
    deltas = list(assistant.stream(QUESTION, video=clips[0], params=PARAMS))
    assert "".join(deltas) == answer.text
    assert len(deltas) > 5


def test_a_stream_left_early_leaves_no_request_behind(assistant: Assistant, clips: list[Path]) -> None:
    stream = assistant.stream(QUESTION, video=clips[0], params=PARAMS)
    next(stream)
    stream.close()
    assert assistant.ask(QUESTION, video=clips[0], params=PARAMS).text


def test_several_questions_about_a_video_encode_it_once(tiny_valley: Path, clips: list[Path]) -> None:
    with Assistant.from_pretrained(tiny_valley) as assistant:
        calls: list[int] = []
        encode = assistant.model.encode_frames
        assistant.model.encode_frames = lambda pixels: (calls.append(len(pixels)), encode(pixels))[1]
        asks = [AskInput(f"{QUESTION} {word}", video=clips[0], params=PARAMS) for word in ("one", "two", "three")]
        assistant.answer_batch(asks)
        assert calls == [4]
        assistant.answer_batch([AskInput(QUESTION, video=clips[0], sampling=FrameSampling(num_frames=3))])
        assert calls == [4, 3]


def test_a_bad_file_costs_its_own_answer_only(assistant: Assistant, clips: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    videos = (clips[0], broken, tmp_path / "none.mp4", clips[1])
    good, bad, missing, again = assistant.answer_batch(
        [AskInput(QUESTION, video=video, params=PARAMS) for video in videos]
    )
    assert good.text
    assert again.text
    assert isinstance(bad.error, MediaError)
    assert "broken.mp4" in str(bad.error)
    assert isinstance(missing.error, SourceNotFoundError)
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        assistant.ask(QUESTION, video=broken)


def test_max_tokens_that_cannot_fit_are_refused_but_the_default_is_fitted(assistant: Assistant) -> None:
    question = "red circle " * 235
    with pytest.raises(PromptTooLongError, match="max_tokens=100"):
        assistant.ask(question, params=SamplingParams(max_tokens=100))
    assert assistant.ask(question).finish_reason in ("stop", "length")


def test_sampling_is_reproduced_by_its_seed(assistant: Assistant, clips: list[Path]) -> None:
    def ask(seed: int) -> str:
        return assistant.ask(
            QUESTION, video=clips[0], params=SamplingParams(max_tokens=16, temperature=1.0, seed=seed)
        ).text

    assert ask(1) == ask(1) != ask(2)


def test_messages_are_the_same_question_with_its_history(
    assistant: Assistant, clips: list[Path], tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    Image.linear_gradient("L").convert("RGB").save(image)
    video_part = {"type": "video_url", "video_url": {"url": str(clips[0])}}
    image_part = {"type": "image_url", "image_url": {"url": str(image)}}
    question = {"role": "user", "content": [video_part, {"type": "text", "text": QUESTION}]}
    asked = assistant.ask(QUESTION, video=clips[0], params=PARAMS)
    assert assistant.ask([question], params=PARAMS) == asked
    system = {"role": "system", "content": "Describe"}
    assert assistant.ask([system, question]) == assistant.ask(QUESTION, video=clips[0], system_prompt="Describe")
    history = [question, {"role": "assistant", "content": asked.text or "yes"}, {"role": "user", "content": "yes no"}]
    longer = assistant.ask(history, params=PARAMS)
    assert longer.num_prompt_tokens > asked.num_prompt_tokens
    assert "".join(assistant.stream(history, params=PARAMS)) == longer.text
    both = [{"role": "user", "content": [video_part, image_part, image_part, {"type": "text", "text": "yes"}]}]
    assert assistant.ask(both) == assistant.ask("yes", video=clips[0], image=[image, str(image)])


def test_messages_bring_their_own_media(assistant: Assistant, clips: list[Path]) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    for beside in ({"video": clips[0]}, {"image": clips[0]}, {"system_prompt": "x"}):
        with pytest.raises(ConversationError, match="bring their own media"):
            assistant.ask(messages, **beside)
    with pytest.raises(ConversationError, match="question is empty"):
        assistant.ask(" ", video=clips[0])


def test_a_stop_string_ends_the_answer_and_frees_the_slot(assistant: Assistant, clips: list[Path]) -> None:
    whole = assistant.ask(QUESTION, video=clips[0], params=PARAMS)
    stop = whole.text[len(whole.text) // 2 :][:3]
    before = whole.text.partition(stop)[0].strip()
    cut = assistant.ask(QUESTION, video=clips[0], params=PARAMS, stop=[stop, "never in it"])
    assert (cut.text, cut.finish_reason) == (before, "stop")
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] != whole.token_ids
    assert "".join(assistant.stream(QUESTION, video=clips[0], params=PARAMS, stop=[stop])) == before
    asks = [AskInput(QUESTION, video=clips[0], params=PARAMS, stop=one) for one in ([stop], [], [stop])]
    assert [answer.text for answer in assistant.answer_batch(asks)] == [before, whole.text, before]


def test_one_stop_text_needs_no_list_and_an_empty_one_is_refused(assistant: Assistant, clips: list[Path]) -> None:
    whole = assistant.ask(QUESTION, video=clips[0], params=PARAMS).text
    stop = whole[len(whole) // 2 :][:3]
    assert assistant.ask(QUESTION, video=clips[0], params=PARAMS, stop=stop).text == whole.partition(stop)[0].strip()
    for empty in ("", ["x", ""]):
        with pytest.raises(ConversationError, match="stop text is empty"):
            assistant.ask(QUESTION, stop=empty)


def test_a_stream_that_nobody_reads_leaves_no_request_behind(assistant: Assistant) -> None:
    assistant.stream(QUESTION, params=PARAMS)
    assert assistant.ask(QUESTION, params=PARAMS).token_ids


def test_several_videos_come_in_order_before_the_images(clips: list[Path]) -> None:
    media = AskInput(QUESTION, video=clips[:2], image=["a.png"]).conversation()[1]
    assert [(part.kind, part.url) for part in media] == [
        ("video", str(clips[0])),
        ("video", str(clips[1])),
        ("image", "a.png"),
    ]


def test_a_folder_of_frames_is_prepared_as_images(assistant: Assistant, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(5):
        Image.linear_gradient("L").rotate(index * 20).convert("RGB").save(folder / f"{index}.png")
    assert assistant.ask(QUESTION, video=folder).finish_reason in ("stop", "length")
    config = assistant.processor.config
    assert config.media_plan("video", is_folder=True) == (config.sampling, config.image_crop)


def test_settings_change_the_prompt_style(tiny_valley: Path, clips: list[Path]) -> None:
    with Assistant.from_pretrained(tiny_valley, settings={"prompt_style": "upstream-serve"}) as assistant:
        assert assistant.processor.stop_strings == ("###",)
        assert assistant.ask(QUESTION, video=clips[0], params=PARAMS).finish_reason is not None
    with pytest.raises(ConfigError, match="did you mean 'prompt_style'"):
        Assistant.from_pretrained(tiny_valley, settings={"prompt_stile": "valley"})
