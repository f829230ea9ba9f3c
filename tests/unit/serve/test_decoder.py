"""LanguageDecoder without Ray: stop strings end a stream and free the engine's place."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from valley_ray.chat import Conversation, Message
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import OtherWeightsError, PromptTooLongError
from valley_ray.processor import ValleyProcessor
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.decoder import LanguageDecoder
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest

QUESTION = Conversation((Message("user", "What is moving?"),))


def answered(decoder: LanguageDecoder, *, stream: bool, stop: tuple[str, ...] = ()) -> list[AnswerDelta]:
    request = AnswerRequest("r", QUESTION, (), (), SamplingParams(max_tokens=24), False, stream, stop)

    async def read() -> list[AnswerDelta]:
        return [delta async for delta in decoder.answer(request)]

    return asyncio.run(read())


@pytest.fixture
def whole(tiny_valley: Path) -> list[AnswerDelta]:
    return answered(LanguageDecoder(ServeConfig(model=tiny_valley), SimpleNamespace()), stream=True)


def test_a_stop_string_of_the_processor_ends_a_stream(
    tiny_valley: Path, whole: list[AnswerDelta], tmp_path: Path
) -> None:
    text = "".join(delta.text for delta in whole)
    stop = text[len(text) // 2 :][:4]
    expected = text.partition(stop)[0].strip()
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_valley.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "processor_config.json").unlink()
    processor = ValleyProcessor.from_pretrained(tiny_valley, settings={"stop_strings": [stop]})
    for file in folder.glob("token*"):
        file.unlink()
    processor.save_pretrained(folder)
    decoder = LanguageDecoder(ServeConfig(model=folder), SimpleNamespace())
    for stream in (True, False):
        deltas = answered(decoder, stream=stream)
        assert "".join(delta.text for delta in deltas) == expected
        assert [delta.finish_reason for delta in deltas][-1] == "stop"
        assert deltas[-1].num_tokens < whole[-1].num_tokens
    assert len(answered(decoder, stream=False)) == 2, "a sign of life, and all of it"
    assert decoder.stats()["num_abandoned"] == 0


def test_a_stop_text_of_the_request_ends_that_answer_alone(tiny_valley: Path, whole: list[AnswerDelta]) -> None:
    text = "".join(delta.text for delta in whole)
    stop = text[len(text) // 2 :][:4]
    decoder = LanguageDecoder(ServeConfig(model=tiny_valley), SimpleNamespace())
    for stream in (True, False):
        deltas = answered(decoder, stream=stream, stop=("never written", stop))
        assert "".join(delta.text for delta in deltas) == text.partition(stop)[0].strip()
        assert deltas[-1].finish_reason == "stop"
    assert "".join(delta.text for delta in answered(decoder, stream=True)) == text


def test_log_probabilities_of_the_answer_come_with_its_text(tiny_valley: Path) -> None:
    decoder = LanguageDecoder(ServeConfig(model=tiny_valley), SimpleNamespace())
    params = SamplingParams(max_tokens=12, logprobs=2)

    async def read(stream: bool) -> list[AnswerDelta]:
        request = AnswerRequest("r", QUESTION, (), (), params, False, stream)
        return [delta async for delta in decoder.answer(request)]

    for stream in (False, True):
        deltas = asyncio.run(read(stream))
        tokens = [token for delta in deltas for token in delta.logprobs]
        last = deltas[-1]
        assert len(tokens) == last.num_tokens - (last.finish_reason == "stop")
        assert all(len(token.top) == 2 and token.top[0].logprob >= token.top[1].logprob for token in tokens)
        # Greedy: the chosen token is the likeliest.
        assert all(token.logprob == pytest.approx(token.top[0].logprob) for token in tokens)
        joined = b"".join(token.utf8 or b"" for token in tokens)
        assert joined.decode("utf-8", "replace").strip() == "".join(delta.text for delta in deltas)


def test_without_the_wish_no_log_probabilities_come(whole: list[AnswerDelta]) -> None:
    assert all(delta.logprobs == () for delta in whole)


@pytest.mark.parametrize(("stream", "least"), [(True, 20), (False, 3)])
def test_an_answer_goes_on_behind_what_another_decoder_sent(tiny_valley: Path, stream: bool, least: int) -> None:
    params = SamplingParams(max_tokens=80, temperature=1.0, seed=3, logprobs=2, logit_bias=((2, -100.0),))
    request = AnswerRequest("r", QUESTION, (), (), params, False, stream)
    config = ServeConfig(model=tiny_valley, weights_version="one")

    async def read(decoder: LanguageDecoder, request: AnswerRequest) -> list[AnswerDelta]:
        return [delta async for delta in decoder.answer(request)]

    whole = asyncio.run(read(LanguageDecoder(config, SimpleNamespace()), request))
    assert len(whole) >= least, "an answer that is not streamed comes in a few pieces"
    other = LanguageDecoder(config, SimpleNamespace())
    for num_sent in (1, len(whole) // 2, len(whole) - 1):
        tokens = tuple(token for delta in whole[:num_sent] for token in delta.token_ids)
        behind = replace(request, answered=tokens, answered_with="one")
        rest = asyncio.run(read(other, behind))
        assert "".join(delta.text for delta in rest) == "".join(delta.text for delta in whole[num_sent:])
        assert [one.text for delta in rest for one in delta.logprobs] == [
            one.text for delta in whole[num_sent:] for one in delta.logprobs
        ]
        assert rest[-1].num_tokens == whole[-1].num_tokens
        assert rest[-1].num_prompt_tokens == whole[-1].num_prompt_tokens
        assert rest[-1].finish_reason == "length"
    with pytest.raises(OtherWeightsError):
        asyncio.run(read(other, replace(behind, answered_with="two")))


def test_what_cannot_fit_is_refused_before_it_is_tokenized(tiny_valley: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = LanguageDecoder(ServeConfig(model=tiny_valley), SimpleNamespace())
    monkeypatch.setattr(ValleyProcessor, "encode_prompt", lambda *_: pytest.fail("it was tokenized"))
    for messages in ((Message("user", "x " * 20_000),), tuple(Message("user", "x") for _ in range(600))):
        request = AnswerRequest("r", Conversation(messages), (), (), SamplingParams(max_tokens=4), False, False)
        with pytest.raises(PromptTooLongError, match="the 512 tokens of the model"):
            asyncio.run(anext(decoder.answer(request)))
