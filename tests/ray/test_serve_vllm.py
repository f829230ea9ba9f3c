"""A server with `engine: vllm` on a local Ray answers as the assistant does; where vLLM is installed."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from clips import write_clip
from engine_cases import needs_vllm
from ray import serve
from tiny import make_tiny_valley

from valley_ray.assistant import Assistant
from valley_ray.engine.engine import SamplingParams
from valley_ray.engine.open import VllmSettings
from valley_ray.serve.app import APP_NAME, ServedApp, run
from valley_ray.serve.config import DeploymentConfig, ServeConfig

pytestmark = [pytest.mark.ray, needs_vllm]

QUESTION = "What is moving?"
SMALL = DeploymentConfig(num_cpus=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Valley with heads that vLLM serves."""
    return make_tiny_valley(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{seed}.mp4", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def app(model: Path, clips: list[Path]) -> Iterator[ServedApp]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = ServeConfig(
        model=model,
        model_name="tiny",
        allow_roots=(clips[0].parent,),
        engine="vllm",
        vllm=VllmSettings(compile=False),
        num_slots=4,
        max_length=128,
        ingress=SMALL,
        sampler=SMALL,
        encoder=SMALL,
        decoder=SMALL,
    )
    try:
        with run(config, port=0) as served:
            yield served
    finally:
        ray.shutdown()


def post(app: ServedApp, clip: Path, **fields: Any) -> httpx.Response:
    content = [{"type": "video_url", "video_url": {"url": str(clip)}}, {"type": "text", "text": QUESTION}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 16, **fields}
    return httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=120)


def ask(app: ServedApp, clip: Path, **fields: Any) -> dict[str, Any]:
    reply = post(app, clip, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_answers_are_those_of_the_assistant(app: ServedApp, model: Path, clips: list[Path]) -> None:
    drawn = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}
    with ThreadPoolExecutor(6) as pool:
        greedy = list(pool.map(lambda clip: ask(app, clip), clips))
        random = list(pool.map(lambda clip: ask(app, clip, **drawn), clips))
    with Assistant.from_pretrained(model) as assistant:
        for params, replies in (
            (SamplingParams(max_tokens=16), greedy),
            (SamplingParams(max_tokens=16, **drawn), random),
        ):
            expected = [assistant.ask(QUESTION, video=clip, params=params).text for clip in clips]
            assert [reply["choices"][0]["message"]["content"] for reply in replies] == expected
    again = ask(app, clips[0])
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32


def test_a_dead_engine_process_is_replaced(app: ServedApp, clips: list[Path]) -> None:
    before = ask(app, clips[0])["choices"][0]["message"]["content"]
    decoder = serve.get_deployment_handle("LanguageDecoder", APP_NAME).stats.remote().result()["process_id"]
    children = psutil.Process(decoder).children(recursive=True)
    engines = [child for child in children if "VLLM" in " ".join(child.cmdline())]
    assert engines, [child.cmdline() for child in children]
    for engine in engines:
        engine.kill()
    deadline = time.monotonic() + 200
    while (reply := post(app, clips[0])).status_code != 200 and time.monotonic() < deadline:
        assert reply.status_code in (429, 503), reply.text
        time.sleep(1)
    assert reply.json()["choices"][0]["message"]["content"] == before
