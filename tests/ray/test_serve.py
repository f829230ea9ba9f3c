"""The served application on a local Ray, against the assistant in this process. One cluster for the module."""

import base64
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from clips import write_clip
from ray import serve

from valley_ray.assistant import AskInput, Assistant
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import ConfigError, PortInUseError
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve.app import APP_NAME, ServedApp, run
from valley_ray.serve.config import DeploymentConfig, ServeConfig
from valley_ray.serve.files import FilesConfig

pytestmark = pytest.mark.ray

QUESTION = "What is moving?"
SMALL = DeploymentConfig(num_cpus=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(4):
        write_clip(folder / f"{seed}.mp4", seed=seed)
    return folder


@pytest.fixture(scope="module")
def app(tiny_valley: Path, folder: Path) -> Iterator[ServedApp]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = ServeConfig(
        model=tiny_valley,
        model_name="tiny",
        allow_roots=(folder,),
        files=FilesConfig(folder=folder / "uploads"),
        num_slots=4,
        ingress=SMALL,
        sampler=SMALL,
        encoder=SMALL,
        decoder=SMALL.model_copy(update={"max_ongoing_requests": 8, "max_queued_requests": 8}),
    )
    try:
        with run(config, port=0) as served:
            yield served
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def client(app: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def assistant(tiny_valley: Path) -> Iterator[Assistant]:
    with Assistant.from_pretrained(tiny_valley) as assistant:
        yield assistant


def body(video: Path | str, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": {"url": str(video)}},
        {"type": "text", "text": question},
    ]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 16, **fields}


def data_uri(video: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"


def post(client: httpx.Client, payload: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=payload)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def stream(client: httpx.Client, payload: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/chat/completions", json={**payload, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def stats(deployment: str) -> dict[str, int]:
    return serve.get_deployment_handle(deployment, APP_NAME).stats.remote().result()


def error_of(client: httpx.Client, payload: dict[str, Any], status: int) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=payload)
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_concurrent_answers_equal_the_assistants(client: httpx.Client, assistant: Assistant, folder: Path) -> None:
    asks = [
        AskInput(question, video=folder / f"{seed}.mp4", params=SamplingParams(max_tokens=16))
        for seed in range(4)
        for question in (QUESTION, "How many shapes do you see?")
    ]
    expected = assistant.answer_batch(asks)
    with ThreadPoolExecutor(8) as pool:
        # Half of them as paths, half as data: URIs.
        replies = list(
            pool.map(
                lambda item: post(
                    client, body(item[1].video if item[0] % 2 else data_uri(item[1].video), item[1].question)
                ),
                enumerate(asks),
            )
        )
    assert [text_of(reply) for reply in replies] == [answer.text for answer in expected]
    for reply, answer in zip(replies, expected, strict=True):
        assert reply["choices"][0]["finish_reason"] == answer.finish_reason
        usage = reply["usage"]
        assert usage["prompt_tokens"] == answer.num_prompt_tokens
        assert usage["completion_tokens"] == len(answer.token_ids)
        assert usage["total_tokens"] == answer.num_prompt_tokens + len(answer.token_ids)


def test_streaming_equals_not_streaming(client: httpx.Client, folder: Path) -> None:
    payload = body(folder / "1.mp4")
    whole = post(client, payload)
    chunks = stream(client, {**payload, "stream_options": {"include_usage": True}})
    *pieces, last, usage = chunks
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in pieces) == text_of(whole)
    assert len(pieces) > 5
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_warm_video_makes_no_encoder_call(client: httpx.Client, folder: Path) -> None:
    video = write_clip(folder / "warm.mp4", seed=77)
    post(client, body(video))
    before = stats("VisionEncoder"), stats("FrameSampler")
    post(client, body(video, "How many shapes do you see?"))
    assert (stats("VisionEncoder"), stats("FrameSampler")) == before
    post(client, body(video, num_frames=2))
    assert stats("VisionEncoder")["num_encoded"] == before[0]["num_encoded"] + 1


def test_frame_sampling_and_seed_of_the_request_are_used(
    client: httpx.Client, assistant: Assistant, folder: Path
) -> None:
    for fields, sampling in (
        ({"num_frames": 2}, FrameSampling(num_frames=2)),
        ({"fps": 2.0}, FrameSampling(num_frames=None, fps=2.0)),
    ):
        params = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=5)
        expected = assistant.ask(QUESTION, video=folder / "2.mp4", sampling=sampling, params=params)
        reply = post(client, body(folder / "2.mp4", temperature=1.0, top_p=0.9, seed=5, **fields))
        assert text_of(reply) == expected.text


def test_the_openai_client_uploads_asks_and_reads_probabilities(app: ServedApp, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)
    by_path = client.chat.completions.create(**body(folder / "3.mp4"))
    stored = client.files.create(file=folder / "3.mp4", purpose="vision")
    asked = client.chat.completions.create(
        **body(stored.id), n=2, temperature=1.0, top_p=1e-9, logprobs=True, top_logprobs=3
    )
    # So small a top_p leaves the likeliest token: drawn answers are the greedy one, over requests of their own.
    assert {choice.message.content for choice in asked.choices} == {by_path.choices[0].message.content}
    assert asked.choices[1].logprobs is not None
    assert len(asked.choices[1].logprobs.content[0].top_logprobs) == 3
    client.files.delete(stored.id)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**body(stored.id))
    with pytest.raises(openai.BadRequestError, match="no frame between"):
        client.chat.completions.create(**body(folder / "3.mp4"), extra_body={"start_s": 1000})


def test_text_alone_and_several_turns_are_answered(client: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Answer about the video."},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "Describe the clip"},
    ]
    reply = post(client, {"model": "tiny", "messages": messages})
    assert reply["object"] == "chat.completion"


def test_bad_media_is_a_400_that_names_file_and_reason(client: httpx.Client, folder: Path) -> None:
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "empty.mp4").write_bytes(b"")
    broken = error_of(client, body(folder / "broken.mp4"), 400)
    assert broken["code"] == "media_not_recognised"
    assert broken["type"] == "invalid_request_error"
    assert "broken.mp4" in broken["message"]
    assert "\n" not in broken["message"]
    # A stream that fails before its first token has its status too.
    assert error_of(client, body(folder / "empty.mp4", stream=True), 400)["code"] == "media_empty"
    assert error_of(client, body(folder / "none.mp4"), 400)["code"] == "source_not_found"
    assert error_of(client, body("/etc/hostname"), 400)["code"] == "source_not_allowed"
    assert error_of(client, body("data:video/mp4;base64,AAAA"), 400)["code"] == "media_not_recognised"
    assert text_of(post(client, body(folder / "0.mp4")))


def test_a_request_that_breaks_the_schema_is_refused_by_field(client: httpx.Client, folder: Path) -> None:
    unknown = error_of(client, body(folder / "0.mp4", temprature=0.5), 400)
    assert unknown["message"] == "unknown field 'temprature'; did you mean 'temperature'?"
    assert unknown["param"] == "temprature"
    assert error_of(client, {**body(folder / "0.mp4"), "model": "gpt"}, 404)["code"] == "model_not_found"
    assert error_of(client, body(folder / "0.mp4", "yes " * 600), 400)["code"] == "prompt_too_long"
    assert error_of(client, body(folder / "0.mp4", num_frames=1000), 400)["code"] == "invalid_sampling"


def wait_until_abandoned(count: int, timeout_s: float = 2.0) -> None:
    """Wait until the decoder has seen `count` requests abandoned and runs none."""
    deadline = time.monotonic() + timeout_s
    while (now := stats("LanguageDecoder"))["num_abandoned"] < count or now["num_unfinished"]:
        assert time.monotonic() < deadline, f"the slot of an abandoned request was not freed: {now}"
        time.sleep(0.02)


def test_a_client_that_goes_away_frees_its_slot(app: ServedApp, client: httpx.Client, folder: Path) -> None:
    payload = body(folder / "0.mp4", max_tokens=400)
    assert post(client, payload)["usage"]["completion_tokens"] == 400, "the test needs an answer that takes a while"
    count = stats("LanguageDecoder")["num_abandoned"]
    with httpx.stream("POST", f"{app.url}/v1/chat/completions", json={**payload, "stream": True}) as response:
        next(response.iter_lines())
    wait_until_abandoned(count + 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{app.url}/v1/chat/completions", json=payload, timeout=0.1)
    wait_until_abandoned(count + 2)


def test_models_and_health(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ok", "model": "tiny"}
    named = client.get("/health", headers={"x-request-id": "mine-1"})
    assert named.headers.get_list("x-request-id") == ["mine-1"], "Serve's proxy sends it, and nobody sends it twice"
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/nowhere").json()["error"]["code"] == "http_404"


def test_a_burst_beyond_capacity_is_refused_quickly_and_the_rest_answered(client: httpx.Client, folder: Path) -> None:
    payload = body(folder / "0.mp4", max_tokens=400)

    def ask(_: int) -> httpx.Response:
        return client.post("/v1/chat/completions", json=payload)

    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(ask, range(40)))
    refused = [response for response in responses if response.status_code == 429]
    assert {response.status_code for response in responses} == {200, 429}
    # 8 run and 8 wait; answers that end while the burst comes in make room for a few more.
    assert len(refused) >= 8
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert refused[0].json()["error"]["code"] == "overloaded"


def test_a_port_in_use_is_named(app: ServedApp, tiny_valley: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}"), run(ServeConfig(model=tiny_valley), port=port):
            pass


def test_a_network_is_not_answered_without_keys(app: ServedApp, tiny_valley: Path) -> None:
    everywhere = run(ServeConfig(model=tiny_valley), host="0.0.0.0", port=0)
    with pytest.raises(ConfigError, match="allow_no_keys"), everywhere:
        pass


def test_a_second_serve_on_the_same_ray_is_refused(app: ServedApp, tiny_valley: Path) -> None:
    with pytest.raises(ConfigError, match="already runs"), run(ServeConfig(model=tiny_valley), port=0):
        pass
