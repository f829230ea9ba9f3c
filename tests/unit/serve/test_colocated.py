"""The colocated shape without Serve: decoder, encoder and sampler in one process over one set of weights."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from clips import write_clip
from ray.serve import context as serve_context

from valley_ray.answering import load_model
from valley_ray.assistant import Assistant
from valley_ray.chat.conversation import from_openai
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import UnavailableError
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve import encoder as encoder_room
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.decoder import LanguageDecoder
from valley_ray.serve.encoder import VisionEncoder
from valley_ray.serve.protocol import AnswerRequest, FrameWish, MediaRef
from valley_ray.serve.sampler import FrameSampler

QUESTION = "What is moving?"
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(autouse=True)
def replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `@serve.batch` asks of the replica that it runs in."""
    sizes = SimpleNamespace(max_ongoing_requests=32)
    context = SimpleNamespace(_deployment_config=sizes, app_name="valley", deployment="d", replica_tag="r")
    context.replica_id = SimpleNamespace(unique_id="r")
    monkeypatch.setattr(serve_context, "_INTERNAL_REPLICA_CONTEXT", context)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4")


def request_about(clip: Path) -> AnswerRequest:
    content = [{"type": "video_url", "video_url": {"url": "found"}}, {"type": "text", "text": QUESTION}]
    conversation, _ = from_openai([{"role": "user", "content": content}])
    media = MediaRef("k", "video", "clip.mp4", path=str(clip))
    return AnswerRequest("r", conversation, (media,), (FrameWish(),), PARAMS, False, False)


async def text_of(decoder: LanguageDecoder, request: AnswerRequest) -> str:
    return "".join([delta.text async for delta in decoder.answer(request)])


def test_one_process_answers_as_the_assistant_and_opens_the_weights_once(
    tiny_valley: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        encoder_room, "load_model", lambda *given, **named: opened.append(1) or load_model(*given, **named)
    )
    decoder = LanguageDecoder(ServeConfig(model=tiny_valley, shape="colocated"))
    request = request_about(clip)

    async def ask() -> list[str]:
        longer = replace(request, frames=(FrameWish(num_frames=2),))
        return [await text_of(decoder, one) for one in (request, request, longer)]

    first, again, _ = asyncio.run(ask())
    with Assistant.from_pretrained(tiny_valley) as assistant:
        assert first == again == assistant.ask(QUESTION, video=clip, params=PARAMS).text
    stats = decoder.stats()
    assert (stats["num_hits"], stats["num_misses"], stats["num_encoded"]) == (1, 2, 2)
    assert len(opened) == 1


def test_the_halves_of_a_split_server_hold_no_weights_of_the_other(tiny_valley: Path) -> None:
    whole = sum(one.numel() for one in load_model(tiny_valley).parameters())
    vision, language = (load_model(tiny_valley, keep=part) for part in ("vision", "language"))
    assert not any("language_model" in name for name, _ in vision.named_parameters())
    assert not any("vision_tower" in name for name, _ in language.named_parameters())
    projector = sum(one.numel() for one in vision.core.parameters())
    assert sum(one.numel() for half in (vision, language) for one in half.parameters()) == whole + projector


def test_nothing_made_with_other_weights_is_handed_out(tiny_valley: Path, clip: Path) -> None:
    old, new = (ServeConfig(model=tiny_valley, weights_version=version) for version in ("old", "new"))
    request = request_about(clip)
    decoder = LanguageDecoder(old, VisionEncoder(new, FrameSampler(new)))
    with pytest.raises(UnavailableError, match="changing to another model"):
        asyncio.run(text_of(decoder, request))
    encoder = VisionEncoder(old, FrameSampler(new))
    with pytest.raises(UnavailableError, match="changing to another model"):
        asyncio.run(encoder.visual_tokens(request.media[0], FrameSampling(num_frames=2), "old"))
