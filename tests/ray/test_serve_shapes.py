"""The colocated shape on a local Ray, two replicas of it: answers, and which replica gets which video."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from clips import write_clip
from ray import serve

from valley_ray.assistant import AskInput, Assistant
from valley_ray.engine.engine import SamplingParams
from valley_ray.serve.app import APP_NAME, ServedApp, run
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.deployment_config import DeploymentConfig
from valley_ray.serve.files import FilesConfig

pytestmark = pytest.mark.ray

QUESTIONS = ("What is moving?", "How many shapes do you see?", "Describe the clip")
NUM_CLIENTS = 3


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{seed}.mp4", seed=seed) for seed in range(6 + 12)]


@pytest.fixture(scope="module")
def app(tiny_valley: Path, clips: list[Path]) -> Iterator[ServedApp]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = ServeConfig(
        model=tiny_valley,
        model_name="tiny",
        shape="colocated",
        allow_roots=(clips[0].parent,),
        files=FilesConfig(folder=clips[0].parent / "uploads"),
        num_slots=8,  # half of them is more than NUM_CLIENTS ever ask at once: no replica is too busy for its videos
        ingress=DeploymentConfig(num_cpus=0.1),
        decoder=DeploymentConfig(num_cpus=0.1, num_replicas=2),
    )
    try:
        with run(config, port=0) as served:
            yield served
    finally:
        ray.shutdown()


def ask(app: ServedApp, video: Path, question: str) -> str:
    content = [{"type": "video_url", "video_url": {"url": str(video)}}, {"type": "text", "text": question}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    reply = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def stats_of_every_replica(num_replicas: int) -> list[dict[str, Any]]:
    """Calls that name no media go to any replica, so each is met after a few."""
    handle, found = serve.get_deployment_handle("LanguageDecoder", APP_NAME), dict[int, dict[str, Any]]()
    for _ in range(100):
        stats = handle.stats.remote().result()
        found[stats["process_id"]] = stats
        if len(found) == num_replicas:
            return list(found.values())
    raise AssertionError(f"only {len(found)} of {num_replicas} replicas answered")


@pytest.mark.slow
def test_a_colocated_server_answers_as_the_assistant_and_a_video_stays_on_one_replica(
    app: ServedApp, tiny_valley: Path, clips: list[Path]
) -> None:
    clips, others = clips[:6], clips[6:]
    # The ingress may learn of one replica a little later than of the other.
    for clip in others:
        ask(app, clip, QUESTIONS[0])
        before = stats_of_every_replica(2)
        if all(stats["num_misses"] for stats in before):
            break
    asks = [(clip, question) for question in QUESTIONS for clip in clips]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        texts = list(pool.map(lambda one: ask(app, *one), asks))
    with Assistant.from_pretrained(tiny_valley) as assistant:
        params = SamplingParams(max_tokens=8)
        expected = assistant.answer_batch([AskInput(text, video=clip, params=params) for clip, text in asks])
    assert texts == [answer.text for answer in expected]
    assert set(serve.status().applications[APP_NAME].deployments) == {"Ingress", "LanguageDecoder"}
    every = stats_of_every_replica(2)
    for count in ("num_misses", "num_encoded"):
        assert sum(stats[count] for stats in every) - sum(stats[count] for stats in before) == len(clips)
