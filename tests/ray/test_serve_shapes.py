"""The colocated shape on a local Ray, two replicas of it: answers, places, and which one gets which video."""

import time
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
from valley_ray.serve.app import APP_NAME, ServedApp, build, run
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.deployment_config import DeploymentConfig
from valley_ray.serve.files import FilesConfig

pytestmark = pytest.mark.ray

QUESTIONS = ("What is moving?", "How many shapes do you see?", "Describe the clip")
NUM_CLIENTS = 3
PLACED = DeploymentConfig(num_cpus=0.1, resources={"places": 1}, labels={"valley-node": "cpu"})


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{seed}.mp4", seed=seed) for seed in range(6 + 12)]


@pytest.fixture(scope="module")
def app(tiny_valley: Path, clips: list[Path]) -> Iterator[ServedApp]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_SLOW_STARTUP_WARNING_S", "1")  # of 30: how soon Serve says that a replica waits
        patch.setenv("RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S", "1")
        node = {"labels": {"valley-node": "cpu"}, "resources": {"places": 3}}
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **node)
    config = ServeConfig(
        model=tiny_valley,
        model_name="tiny",
        shape="colocated",
        allow_roots=(clips[0].parent,),
        files=FilesConfig(folder=clips[0].parent / "uploads"),
        num_slots=8,  # half of them is more than NUM_CLIENTS ever ask at once: no replica is too busy for its videos
        ingress=DeploymentConfig(num_cpus=0.1),
        decoder=PLACED.model_copy(update={"num_replicas": 2}),
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


def test_replicas_take_the_place_that_they_ask_for(app: ServedApp) -> None:
    assert ray.available_resources().get("places") == 3 - 2


def test_a_replica_that_no_node_has_the_label_for_waits_and_the_status_says_so(
    app: ServedApp, tiny_valley: Path, tmp_path: Path
) -> None:
    # Serve gives a replica that waits its drain time too before it drops it.
    elsewhere = PLACED.model_copy(update={"labels": {"valley-node": "gpu"}, "drain_timeout_s": 0.0})
    small, files = DeploymentConfig(num_cpus=0.1), FilesConfig(folder=tmp_path)
    config = ServeConfig(model=tiny_valley, shape="colocated", files=files, ingress=small, decoder=elsewhere)
    target = serve.RunTarget(build(config), name="elsewhere", route_prefix="/elsewhere")
    serve.run_many([target], wait_for_applications_running=False)
    try:
        deadline = time.monotonic() + 60
        # By then the decoder would have its place as well: both are asked for at once.
        while (found := serve.status().applications["elsewhere"].deployments)["Ingress"].status != "HEALTHY":
            assert time.monotonic() < deadline, found
        assert found["LanguageDecoder"].replica_states == {"STARTING": 1}
        assert "1 replicas that have taken more than 1s to be scheduled" in found["LanguageDecoder"].message
        assert ray.available_resources().get("places") == 3 - 2
    finally:
        serve.delete("elsewhere")
