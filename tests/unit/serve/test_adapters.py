"""A decoder with adapters, colocated and without Serve: answers, what is shared, what is not, and what is refused."""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clips import write_clip
from ray import serve
from ray.serve import context as serve_context
from serve_stand_in import HELLO, app, config, openai_client, send, two_words
from tiny_adapters import make_adapter

from valley_ray.assistant import Assistant
from valley_ray.chat.conversation import from_openai
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import CheckpointError, ConfigError, UnavailableError
from valley_ray.processor import ValleyProcessor
from valley_ray.serve.app import build
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.decoder import LanguageDecoder
from valley_ray.serve.encoder import VisionEncoder
from valley_ray.serve.protocol import AnswerRequest, FrameWish, MediaRef

QUESTION = "What is moving?"
PARAMS = SamplingParams(max_tokens=12)
ADAPTERS: dict[str, Any] = {"adapters": {"red": Path("a/red"), "blue": Path("a/blue")}}


@pytest.fixture(autouse=True)
def replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `@serve.batch` asks of the replica that it runs in; its queue is one per process and bound to a loop."""
    monkeypatch.setattr(VisionEncoder, "_encode", serve.batch(VisionEncoder._encode.__wrapped__))
    sizes = SimpleNamespace(max_ongoing_requests=32)
    context = SimpleNamespace(_deployment_config=sizes, app_name="valley", deployment="d", replica_tag="r")
    context.replica_id = SimpleNamespace(unique_id="r")
    monkeypatch.setattr(serve_context, "_INTERNAL_REPLICA_CONTEXT", context)


@pytest.fixture(scope="module")
def adapters(tiny_valley: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "red": make_adapter(tiny_valley, folder / "red", seed=1),
        "blue": make_adapter(tiny_valley, folder / "blue", seed=2, r=8, use_dora=True),
    }


def requests_for(names: Sequence[str | None], clip: Path) -> list[AnswerRequest]:
    content = [{"type": "video_url", "video_url": {"url": "found"}}, {"type": "text", "text": QUESTION}]
    conversation, _ = from_openai([{"role": "user", "content": content}])
    media = MediaRef("k", "video", "clip.mp4", path=str(clip))
    request = AnswerRequest("r", conversation, (media,), (FrameWish(),), PARAMS, False, False)
    return [replace(request, adapter=name) for name in names]


def answered(decoder: LanguageDecoder, *rounds: Sequence[AnswerRequest]) -> list[list[str]]:
    """Texts of each round, whose requests are asked together."""

    async def text_of(request: AnswerRequest) -> str:
        return "".join([delta.text async for delta in decoder.answer(request)])

    async def ask() -> list[list[str]]:
        return [await asyncio.gather(*map(text_of, requests)) for requests in rounds]

    return asyncio.run(ask())


def test_answers_are_those_of_the_adapters_folders_and_the_tower_runs_once(
    tiny_valley: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    decoder = LanguageDecoder(ServeConfig(model=tiny_valley, shape="colocated", adapters=adapters))
    names = [None, "red", "blue", "red", None]
    folders = {None: tiny_valley, **adapters}
    expected = {}
    for name, folder in folders.items():
        with Assistant.from_pretrained(folder) as assistant:
            expected[name] = assistant.ask(QUESTION, video=clip, params=PARAMS).text
    assert len(set(expected.values())) == 3, "the test needs answers that differ"
    together, *alone = answered(decoder, requests_for(names, clip), *([one] for one in requests_for(names, clip)))
    assert together == [text for [text] in alone] == [expected[name] for name in names]
    stats = decoder.stats()
    # Visual tokens are made for each of the three, from features that are made once.
    assert (stats["num_misses"], stats["num_encoded"], stats["num_adapters"]) == (3, 1, 2)


def test_more_adapters_than_fit_take_turns(tiny_valley: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    settings = ServeConfig(model=tiny_valley, shape="colocated", adapters=adapters, max_adapters=1)
    decoder = LanguageDecoder(settings)
    names = ["red", "blue"] * 3
    first, then = answered(decoder, requests_for(names[:2], clip), requests_for(names, clip))
    assert first[0] != first[1]
    assert then == first * 3
    assert decoder.stats()["num_adapters"] == 1
    assert decoder.stats()["num_adapters_opened"] >= 3


def test_an_adapter_may_have_prompts_of_its_own_but_no_frames(
    tiny_valley: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    folder = shutil.copytree(adapters["red"], tmp_path / "own")
    words = {"system_prompt": "How many shapes do you see?", "sampling": {"num_frames": 2}}
    ValleyProcessor.from_pretrained(tiny_valley, settings=words).save_pretrained(folder)
    with Assistant.from_pretrained(folder) as assistant:
        expected = assistant.ask(QUESTION, video=clip, params=PARAMS).text
    settings = ServeConfig(model=tiny_valley, shape="colocated", adapters={**adapters, "own": folder})
    [texts] = answered(LanguageDecoder(settings), requests_for(["red", "own"], clip))
    assert texts[1] == expected != texts[0]
    ValleyProcessor.from_pretrained(tiny_valley, settings={"image_mean": (0.1, 0.1, 0.1)}).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="own has another image_mean than the model"):
        LanguageDecoder(settings)


def test_a_replica_with_an_adapter_that_does_not_fit_does_not_come_up(
    tiny_valley: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    odd = shutil.copytree(adapters["red"], tmp_path / "odd")
    text = (odd / "adapter_config.json").read_text()
    (odd / "adapter_config.json").write_text(text.replace('"r": 4', '"r": 5'))
    with pytest.raises(CheckpointError, match=r"has rank 4, adapter_config\.json says r=5"):
        LanguageDecoder(ServeConfig(model=tiny_valley, adapters={"odd": odd}), SimpleNamespace())
    decoder = LanguageDecoder(ServeConfig(model=tiny_valley), SimpleNamespace())
    with pytest.raises(UnavailableError, match="does not have the adapter 'red' yet"):
        answered(decoder, requests_for(["red"], odd))


def test_folders_and_names_are_checked_where_the_application_is_built(
    tiny_valley: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    pickled = shutil.copytree(adapters["red"], tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for given, problem in (
        ({"red": tmp_path / "none"}, "adapters.red: no adapter_config.json in"),
        ({"red": tiny_valley}, "adapters.red: no adapter_config.json in"),
        ({"red": pickled}, "adapters.red: .* set allow_bin: true"),
        ({"re:d": adapters["red"]}, "adapters"),
    ):
        with pytest.raises(ConfigError, match=problem) as refused:
            build({"model": str(tiny_valley), "adapters": {name: str(folder) for name, folder in given.items()}})
        assert "\n" not in str(refused.value)
    (pickled / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapters\.red: .* is a whole model"):
        build({"model": str(tiny_valley), "adapters": {"red": str(pickled)}})


def test_the_model_of_a_request_names_the_adapter() -> None:
    recorder = two_words()
    settings = config(model_name="tiny", **ADAPTERS)

    async def ask() -> None:
        api = app(recorder, settings)
        client = openai_client(api)
        for name in ("tiny", "tiny:red", "tiny:blue"):
            reply = await client.chat.completions.create(**{**HELLO, "model": name})
            assert reply.model == name
        for name in ("red", "tiny:", "tiny:green", "tiny:red:blue"):
            response = await send(api, json={**HELLO, "model": name})
            assert response.status_code == 404
            error = response.json()["error"]
            assert error["code"] == "model_not_found"
            expected = f"no model {name!r} here; this server has 'tiny', 'tiny:red', 'tiny:blue'"
            assert error["message"] == expected

    asyncio.run(ask())
    assert [request.adapter for request in recorder.requests] == [None, "red", "blue"]


def test_models_are_listed_with_their_parents() -> None:
    async def ask() -> None:
        client = openai_client(app(settings=config(model_name="tiny", **ADAPTERS)))
        listed = [model async for model in client.models.list()]
        assert [(model.id, model.parent) for model in listed] == [
            ("tiny", None),
            ("tiny:red", "tiny"),
            ("tiny:blue", "tiny"),
        ]
        assert (await client.models.retrieve("tiny:blue")).parent == "tiny"

    asyncio.run(ask())
