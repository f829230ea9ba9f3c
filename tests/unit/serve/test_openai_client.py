"""The openai-python client, unchanged, against the HTTP front in this process."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import openai
import pytest
from serve_stand_in import Recorder, app, config, openai_client, two_words

from valley_ray.errors import NotMediaError, OverloadedError, UnavailableError
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest, FrameWish, TokenChance, TokenLogprob

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello"}]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_question_and_the_next_turn_with_the_clients_own_message() -> None:
    recorder = two_words()
    client = openai_client(app(recorder))
    reply = await client.chat.completions.create(model="tiny", messages=HELLO)
    assert reply.choices[0].message.content == "red circle"
    assert reply.usage is not None
    assert reply.usage.total_tokens == 8
    turns = [*HELLO, reply.choices[0].message, {"role": "user", "content": "and then?"}]
    await client.chat.completions.create(model="tiny", messages=turns)
    said = [message.content for message in recorder.requests[1].conversation.messages]
    assert said == ["hello", "red circle", "and then?"]


async def test_a_stream_has_text_finish_reason_and_usage() -> None:
    client = openai_client(app(two_words()))
    stream = await client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert text == "red circle"
    assert reasons[-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_clients_stream_helper_puts_a_whole_completion_together() -> None:
    client = openai_client(app(two_words()))
    async with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "red circle"


async def test_several_choices_are_drawn_with_seeds_of_their_own() -> None:
    recorder = two_words()
    client = openai_client(app(recorder))
    reply = await client.chat.completions.create(model="tiny", messages=HELLO, n=3, temperature=1.0, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {"red circle"}
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 9)
    seeds = [request.params.seed for request in recorder.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_greedy_choices_are_answered_once_and_all_the_same() -> None:
    recorder = two_words()
    client = openai_client(app(recorder))
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, n=2, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["red circle", "red circle"]
    assert len(recorder.requests) == 1


async def test_one_choice_that_fails_abandons_the_others() -> None:
    class Failing(Recorder):
        async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
            self.requests.append(request)
            try:
                if len(self.requests) == 2:
                    raise OverloadedError("full")
                await asyncio.Event().wait()
                yield AnswerDelta("never", 1, 1, "stop")
            finally:
                self.num_closed += 1

    recorder = Failing()
    client = openai_client(app(recorder))
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="tiny", messages=HELLO, n=3, temperature=1)
    assert recorder.num_closed == len(recorder.requests) == 3


async def test_log_probabilities_come_as_the_client_reads_them() -> None:
    red = TokenLogprob("red", b"red", -0.5, (TokenChance("red", b"red", -0.5), TokenChance("\ufffd", b"\xe2", -2.0)))
    recorder = Recorder(AnswerDelta("red", 5, 1, None, (red,)), AnswerDelta("", 5, 2, "stop"))
    client = openai_client(app(recorder))
    reply = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(one.token, one.logprob) for one in logprobs.content] == [("red", -0.5)]
    assert [one.bytes for one in logprobs.content[0].top_logprobs] == [[114, 101, 100], [0xE2]]
    assert recorder.requests[0].params.logprobs == 2
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].logprobs is not None
    assert recorder.requests[1].params.logprobs == 0


async def test_penalties_and_bias_become_sampling_parameters() -> None:
    recorder = two_words()
    await openai_client(app(recorder)).chat.completions.create(
        model="tiny", messages=HELLO, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"12": -100}
    )
    params = recorder.requests[0].params
    assert (params.frequency_penalty, params.presence_penalty, params.logit_bias) == (0.5, -1, ((12, -100.0),))


async def test_a_file_is_uploaded_listed_asked_about_and_deleted(tmp_path: Path) -> None:
    recorder = two_words()
    client = openai_client(app(recorder, config(tmp_path)))
    stored = await client.files.create(file=("../../clip.mp4", b"some video"), purpose="user_data")
    image = await client.files.create(file=("a.bin", PNG), purpose="vision")
    assert (stored.bytes, stored.filename, stored.purpose) == (10, "../../clip.mp4", "user_data")
    assert {file.id async for file in await client.files.list()} == {stored.id, image.id}
    assert [file.id async for file in await client.files.list(purpose="vision")] == [image.id]
    assert (await client.files.content(stored.id)).content == b"some video"
    content = [
        {"type": "video_url", "video_url": {"url": stored.id}},
        {"type": "file", "file": {"file_id": image.id}},
        {"type": "text", "text": "what?"},
    ]
    await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    [request] = recorder.requests
    clip, picture = request.media
    assert [media.kind for media in request.media] == ["video", "image"]
    assert clip.path is not None
    assert Path(clip.path).read_bytes() == b"some video"
    assert Path(clip.path).is_relative_to(tmp_path)
    assert request.conversation.messages[0].content == "<video>\n<image>\nwhat?"
    assert (await client.files.delete(stored.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(stored.id)
    with pytest.raises(openai.NotFoundError, match="never here"):
        await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    assert picture.key.startswith("bytes-")


async def test_frames_are_named_on_the_request_and_on_a_video() -> None:
    recorder = two_words()
    url = "data:video/mp4;base64,AAEC"
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}, "fps": 2.0},
        {"type": "video_url", "video_url": {"url": url, "num_frames": 3, "end_s": 9}},
        {"type": "text", "text": "what?"},
    ]
    await openai_client(app(recorder)).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        extra_body={"num_frames": 4, "start_s": 1.5},
    )
    assert recorder.requests[0].frames == (
        FrameWish(num_frames=4, start_s=1.5),
        FrameWish(fps=2.0, start_s=1.5),
        FrameWish(num_frames=3, start_s=1.5, end_s=9),
    )


async def test_models_are_listed_and_found() -> None:
    client = openai_client(app())
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "valley_ray"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt")


async def test_errors_are_the_clients_own_classes() -> None:
    async def ask(recorder: Recorder, **fields: object) -> None:
        await openai_client(app(recorder)).chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})

    with pytest.raises(openai.NotFoundError) as missing:
        await ask(two_words(), model="gpt")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await ask(two_words(), temperature=3)
    with pytest.raises(openai.BadRequestError) as bad:
        await ask(Recorder(NotMediaError("x.mp4: no video")))
    assert bad.value.code == "media_not_recognised"
    with pytest.raises(openai.RateLimitError):
        await ask(Recorder(OverloadedError("full")))
    for error in (UnavailableError("starting"), KeyError("bug")):
        with pytest.raises(openai.InternalServerError):
            await ask(Recorder(error))
    client = openai_client(app(Recorder(AnswerDelta("red", 5, 1), OverloadedError("gone"))))
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert (await anext(stream)).choices[0].delta.content == "red"
    with pytest.raises(openai.APIError, match="gone"):
        await anext(stream)
