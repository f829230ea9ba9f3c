"""The served application under bursts, leaving clients, killed replicas, changing size and redeploys; one cluster."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from clips import write_clip
from ray import serve
from serve_load import PATH, Tally, ask, body, burst, kill_one, load, replicas, stopped, wait_until
from tiny import make_tiny_valley

from valley_ray.serve.app import APP_NAME, ServedApp, build, run
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.deployment_config import AutoscalingSettings, DeploymentConfig
from valley_ray.serve.files import FilesConfig

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(900)]

QUESTIONS = ("What is moving?", "How many shapes do you see?", "Describe the clip", "Which colour?")
SMALL = DeploymentConfig(num_cpus=0.1)
NUM_SLOTS, NUM_QUEUED = 4, 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{seed}.mp4", seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def config(tiny_valley: Path, clips: list[Path]) -> ServeConfig:
    return ServeConfig(
        model=tiny_valley,
        model_name="tiny",
        allow_roots=(clips[0].parent,),
        files=FilesConfig(folder=clips[0].parent / "uploads"),
        num_slots=NUM_SLOTS,
        ingress=SMALL,
        sampler=SMALL,
        encoder=SMALL,
        decoder=DeploymentConfig(
            num_cpus=0.1, num_replicas=2, max_ongoing_requests=NUM_SLOTS, max_queued_requests=NUM_QUEUED
        ),
    )


@pytest.fixture(scope="module")
def app(config: ServeConfig) -> Iterator[ServedApp]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with run(config, port=0, log_level="WARNING") as served:
            yield served
    finally:
        ray.shutdown()


def requests_of(clips: list[Path], *, max_tokens: int) -> list[dict[str, Any]]:
    """Greedy and drawn answers, streams and whole ones."""
    return [
        body(question, clip, max_tokens=max_tokens, stream=place % 2 == 0, temperature=float(place % 3 > 0), seed=place)
        for place, (clip, question) in enumerate((clip, question) for clip in clips for question in QUESTIONS)
    ]


def check(tally: Tally, expected: list[str], told: str) -> None:
    """Print what came of a load, and hold every answer against the undisturbed one."""
    seconds = sorted(one for _, _, one in tally.answered)
    print(
        f"\n{told}: {len(tally.answered)} answered, {len(tally.lost)} lost; seconds: median "
        f"{seconds[len(seconds) // 2]:.2f}, longest {seconds[-1]:.2f}"
    )
    assert not tally.lost, tally.lost
    assert all(text == expected[turn] for turn, text, _ in tally.answered)


@pytest.mark.slow
def test_a_killed_decoder_breaks_no_answer_and_one_client_takes_no_video_from_another(
    app: ServedApp, clips: list[Path]
) -> None:
    requests = requests_of(clips, max_tokens=200)[:4]
    expected = [ask(app.url, one) for one in requests]
    with load(app.url, requests, num_clients=4) as tally:
        wait_until(lambda: len(tally.answered) >= 1, 60, "an answer")
        kill_one("LanguageDecoder")
        before = len(tally.answered)
        wait_until(lambda: len(tally.answered) >= before + 8, 120, "answers after the kill")
    check(tally, expected, "one decoder killed")

    fresh = body(QUESTIONS[0], clips[0], max_tokens=4, num_frames=3)
    with ThreadPoolExecutor(1) as pool, stopped(replicas("FrameSampler")):
        second = pool.submit(lambda: time.sleep(0.3) or ask(app.url, fresh))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(app.url + PATH, json=fresh, timeout=1.0)
        time.sleep(0.5)
    assert second.result(), "the frames came for the one who waited on"


@pytest.mark.slow
def test_of_a_burst_what_is_over_capacity_is_refused_within_half_a_second(app: ServedApp, clips: list[Path]) -> None:
    requests = [body(QUESTIONS[0], clip, max_tokens=400) for clip in clips]
    for one in requests:
        ask(app.url, one)
    results = burst(app.url, [requests[place % len(requests)] for place in range(40)])
    refused = sorted(seconds for seconds, status, _ in results if status == 429)
    print(
        f"\nburst of 40 over {2 * NUM_SLOTS} + {NUM_QUEUED} places: {len(refused)} refused, the slowest after "
        f"{refused[-1]:.3f} s, the median after {refused[len(refused) // 2]:.3f} s"
    )
    assert {status for _, status, _ in results} == {200, 429}
    assert len(refused) >= 40 - 2 * NUM_SLOTS - NUM_QUEUED - 4, "answers that end meanwhile make room for a few more"
    assert {after for _, status, after in results if status == 429} == {"1"}
    assert refused[-1] <= 0.5


def size() -> tuple[int, int]:
    """Decoders and encoders that run."""
    deployments = serve.status().applications[APP_NAME].deployments
    decoders, encoders = (
        deployments[one].replica_states.get("RUNNING", 0) for one in ("LanguageDecoder", "VisionEncoder")
    )
    return decoders, encoders


def num_unfinished() -> int:
    """Requests in the engines of all decoders."""
    handle, found = serve.get_deployment_handle("LanguageDecoder", APP_NAME), dict[int, int]()
    for _ in range(50):
        stats = handle.stats.remote().result()
        found[stats["process_id"]] = stats["num_unfinished"]
        if len(found) == len(replicas("LanguageDecoder")):
            break
    return sum(found.values())


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_place_within_a_second(app: ServedApp, clips: list[Path]) -> None:
    long = body(QUESTIONS[0], clips[0], max_tokens=400)
    ask(app.url, {**long, "max_tokens": 1})
    with httpx.stream("POST", app.url + PATH, json={**long, "stream": True}) as response:
        next(response.iter_lines())
    streaming = wait_until(lambda: num_unfinished() == 0, 5, "the place of a stream that was left is free")
    with suppress(httpx.ReadTimeout):
        httpx.post(app.url + PATH, json=long, timeout=0.15)
    waiting = wait_until(lambda: num_unfinished() == 0, 5, "the place of a client that left before its answer is free")

    handle = serve.get_deployment_handle("LanguageDecoder", APP_NAME)
    with stopped(replicas("FrameSampler")), ThreadPoolExecutor(2 * NUM_SLOTS) as pool:

        def leave(place: int) -> None:
            fresh = body(QUESTIONS[0], clips[place % 4], max_tokens=4, num_frames=5 + place // 4)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(app.url + PATH, json=fresh, timeout=3.0)

        list(pool.map(leave, range(2 * NUM_SLOTS)))
        # All places of both decoders were taken by videos that nobody decodes.
        began = time.monotonic()
        ask(app.url, body("yes", max_tokens=1))
        decoding = time.monotonic() - began
        assert handle.stats.remote().result()["num_unfinished"] == 0
    print(
        f"\na client that leaves: {streaming:.2f} s in mid-stream, {waiting:.2f} s before the first token, "
        f"{decoding:.2f} s (with an answer for another client) during decoding"
    )
    assert max(streaming, waiting, decoding) <= 1.0


@pytest.mark.slow
def test_replicas_killed_under_load_lose_no_request(app: ServedApp, clips: list[Path]) -> None:
    requests = requests_of(clips, max_tokens=300)
    expected = [ask(app.url, one) for one in requests]
    with load(app.url, requests, num_clients=6) as tally:
        for _ in range(4):
            wait_until(lambda: size()[0] == len(replicas("LanguageDecoder")) == 2, 120, "both decoders are back")
            before = len(tally.answered)
            wait_until(lambda before=before: len(tally.answered) >= before + 25, 240, "answers between kills")
            kill_one("LanguageDecoder")
        before = len(tally.answered)
        wait_until(lambda: len(tally.answered) >= before + 12, 240, "answers after the last kill")
    assert len(tally.answered) >= 100
    check(tally, expected, "4 decoders killed")

    for deployment in ("VisionEncoder", "FrameSampler"):
        cold = [
            body(QUESTIONS[0], clip, max_tokens=4, start_s=0, num_frames=frames, stream=frames % 2 == 0)
            for frames in range(2, 10)
            for clip in clips
        ]
        if deployment == "FrameSampler":
            cold = [{**one, "start_s": 0.25} for one in cold]
        with load(app.url, cold, num_clients=4) as tally:
            wait_until(lambda tally=tally: len(tally.answered) >= 6, 120, "answers before the kill")
            kill_one(deployment)
            wait_until(lambda tally=tally: len(tally.answered) >= 24, 240, "answers after the kill")
        check(tally, [ask(app.url, one) for one in cold], f"{deployment} killed")


@pytest.mark.slow
def test_redeploys_drop_nothing_and_mix_no_models(
    app: ServedApp, config: ServeConfig, clips: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_tiny_valley(tmp_path_factory.mktemp("other"), seed=1)
    requests = requests_of(clips, max_tokens=400)
    by_old = [ask(app.url, one) for one in requests]
    changes = {
        "another num_slots": config.model_copy(update={"num_slots": 2}),
        "another model": config.model_copy(update={"model": other, "num_slots": 2}),
        "the first model again": config,
    }
    for told, changed in changes.items():
        with load(app.url, requests, num_clients=4) as tally:
            wait_until(lambda tally=tally: len(tally.answered) >= 4, 120, "answers before the redeploy")
            began = time.monotonic()
            serve.run(build(changed), name=APP_NAME, route_prefix="/")
            seconds = time.monotonic() - began
            before = len(tally.answered)
            wait_until(lambda tally=tally, n=before + 8: len(tally.answered) >= n, 240, "answers after the redeploy")
        if told == "another model":
            by_new = [ask(app.url, one) for one in requests]
            assert all(old != new for old, new in zip(by_old, by_new, strict=True))
        known = [by_old] if told == "another num_slots" else [by_old, by_new]
        counts = [sum(text == texts[turn] for turn, text, _ in tally.answered) for texts in known]
        print(f"\nredeploy ({told}) in {seconds:.1f} s: answers by model {counts}, {len(tally.lost)} lost")
        assert not tally.lost, tally.lost
        assert sum(counts) == len(tally.answered), "an answer of neither model"
        assert min(counts) > 0


@pytest.mark.slow
def test_decoders_and_encoders_grow_and_shrink_apart(app: ServedApp, config: ServeConfig, clips: list[Path]) -> None:
    def settings(most: int) -> AutoscalingSettings:
        return AutoscalingSettings(
            max_replicas=most, target_ongoing_requests=2, look_back_s=2, upscale_delay_s=1, downscale_delay_s=3
        )

    decoder = config.decoder.model_copy(update={"autoscaling": settings(3), "max_queued_requests": 64})
    encoder = config.encoder.model_copy(update={"autoscaling": settings(2)})
    serve.run(build(config.model_copy(update={"decoder": decoder, "encoder": encoder})), name=APP_NAME)
    sizes, stop = list[tuple[int, int]](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            if (now := size()) != (sizes or [None])[-1]:
                sizes.append(now)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        warm = [{**one, "max_tokens": 300} for one in requests_of(clips, max_tokens=300)]
        expected = [ask(app.url, one) for one in warm]
        with load(app.url, warm, num_clients=1) as few:
            with load(app.url, warm, num_clients=9) as many:
                wait_until(lambda: size() == (3, 1), 120, "three decoders, one encoder")
            wait_until(lambda: size() == (1, 1), 180, "one decoder again")
            before = len(few.answered)
            wait_until(lambda: len(few.answered) >= before + 4, 60, "answers by the last one")
        cold = [body(QUESTIONS[0], clip, max_tokens=1, fps=4 + place) for place in range(200) for clip in clips]
        with load(app.url, cold, num_clients=10) as fresh:
            wait_until(lambda: size()[1] == 2, 120, "two encoders")
        sizes.append(size())
    finally:
        stop.set()
        watching.join()
    print(f"\n(decoders, encoders) over time: {sizes}")
    check(many, expected, "nine clients while decoders grow")
    check(few, expected, "one client all the while")
    assert not fresh.lost, fresh.lost
