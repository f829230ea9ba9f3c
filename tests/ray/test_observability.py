"""What a running server tells: metrics as Prometheus scrapes them, all that the dashboard asks for, the access log."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from clips import write_clip
from dashboard import expressions, labels_of, metrics_of
from prometheus_client.parser import text_string_to_metric_families

from valley_ray.serve.app import ServedApp, run
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.deployment_config import AutoscalingSettings, DeploymentConfig

pytestmark = pytest.mark.ray

SMALL = DeploymentConfig(num_cpus=0.1)
CHAT = "/v1/chat/completions"
LIVE_WITHIN_S = 30.0
"""Ray's processes report every second here, some of Serve's gauges later."""

Scrape = dict[str, list[tuple[dict[str, str], float]]]
"""Name of a series → its labels and values."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def app(tiny_valley: Path, folder: Path) -> Iterator[ServedApp]:
    often = {"metrics_report_interval_ms": 1000}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=often)
    config = ServeConfig(
        model=tiny_valley,
        model_name="tiny",
        allow_roots=(folder,),
        ingress=SMALL,
        # Serve reports what its autoscaler sees of deployments that scale.
        sampler=SMALL.model_copy(update={"autoscaling": AutoscalingSettings(max_replicas=2)}),
        encoder=SMALL,
        decoder=SMALL,
    )
    try:
        with run(config, port=0) as served:
            yield served
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def asked(app: ServedApp, folder: Path) -> dict[str, int]:
    """Two answers about one video, one about none, two refusals, one stream that nobody read to its end."""
    video = write_clip(folder / "a.mp4", seed=1)
    (folder / "broken.mp4").write_bytes(b"no video")
    statuses = {}

    def ask(name: str, content: Any, **fields: Any) -> None:
        payload = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
        statuses[name] = client.post(CHAT, json=payload, headers={"x-request-id": name}).status_code

    def about(path: Path, text: str) -> list[dict[str, Any]]:
        return [{"type": "video_url", "video_url": {"url": str(path)}}, {"type": "text", "text": text}]

    with httpx.Client(base_url=app.url, timeout=60) as client:
        ask("cold", about(video, "What is moving?"))
        ask("warm", about(video, "How many shapes do you see?"))
        ask("text", "yes", max_tokens=1)
        ask("unknown", "yes", model="other")
        ask("broken", about(folder / "broken.mp4", "Describe the clip"))
        long = {"model": "tiny", "messages": [{"role": "user", "content": "yes"}], "max_tokens": 480, "stream": True}
        with client.stream("POST", CHAT, json=long, headers={"x-request-id": "left"}) as response:
            next(response.iter_lines())
    assert statuses == {"cold": 200, "warm": 200, "text": 200, "unknown": 404, "broken": 400}
    return statuses


def scrape() -> Scrape:
    (node,) = ray.nodes()
    page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    series: Scrape = defaultdict(list)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            series[sample.name].append((sample.labels, sample.value))
    return series


def live(holds: Callable[[Scrape], bool]) -> Scrape:
    """The newest samples of every name, as soon as they `hold`, or what there is when time is over.

    Serve sets some gauges only when they change, and Ray drops those after a while.
    """
    deadline, seen = time.monotonic() + LIVE_WITHIN_S, scrape()
    while not holds(seen) and time.monotonic() < deadline:
        time.sleep(0.5)
        seen.update(scrape())
    return seen


def value(seen: Scrape, name: str, **labels: str) -> float:
    """Sum of the series that have these labels."""
    return sum(number for found, number in seen[name] if labels.items() <= found.items())


def test_every_expression_of_the_dashboard_names_a_metric_that_is_there(asked: dict[str, int]) -> None:
    wanted = {name for _, expression in expressions() for name in metrics_of(expression)}
    assert len(wanted) > 20
    seen = live(lambda now: wanted <= set(now))
    assert wanted <= set(seen), f"nobody reports {sorted(wanted - set(seen))}"
    for title, expression in expressions():
        known = {label for name in metrics_of(expression) for found, _ in seen[name] for label in found}
        assert labels_of(expression) <= known, f"{title}: no such label: {labels_of(expression) - known}"


def test_requests_answers_and_caches_are_counted(asked: dict[str, int]) -> None:
    seen = live(
        lambda now: value(now, "ray_valley_answers_total") >= 4 and value(now, "ray_valley_requests_total") >= 6
    )
    outcomes = {
        outcome: value(seen, "ray_valley_requests_total", endpoint="chat", outcome=outcome)
        for outcome in ("answered", "refused", "failed", "aborted")
    }
    assert outcomes == {"answered": 3, "refused": 2, "failed": 0, "aborted": 1}
    reasons = {labels["reason"]: number for labels, number in seen["ray_valley_refusals_total"]}
    assert reasons == {"model_not_found": 1, "media_not_recognised": 1}
    assert value(seen, "ray_valley_answers_total", ended="abandoned", model="tiny") == 1
    assert value(seen, "ray_valley_answers_total") == 4
    # Two answers of eight tokens at most, one of one, and what was made of the one that nobody read.
    assert 3 < value(seen, "ray_valley_new_tokens_total", model="tiny") < 16 + 1 + 480
    assert value(seen, "ray_valley_prompt_tokens_total") > value(seen, "ray_valley_cached_prompt_tokens_total") > 0
    looks = {(labels["cache"], labels["result"]): number for labels, number in seen["ray_valley_cache_lookups_total"]}
    # Warm is the decoder's alone; the broken file passes through all three.
    assert looks == {
        ("decoder", "hit"): 1, ("decoder", "miss"): 2, ("encoder", "miss"): 2, ("sampler", "miss"): 2
    }  # fmt: skip
    stages = {
        stage: value(seen, "ray_valley_stage_seconds_count", stage=stage)
        for stage in ("fetch", "queue", "media", "decode", "encode", "prefill", "answer")
    }
    assert stages == {"fetch": 3, "queue": 5, "media": 2, "decode": 1, "encode": 1, "prefill": 4, "answer": 3}
    deployments = {labels["deployment"] for labels, _ in seen["ray_valley_stage_seconds_count"]}
    assert deployments == {"Ingress", "LanguageDecoder", "VisionEncoder", "FrameSampler"}
    assert value(seen, "ray_valley_running_requests") == value(seen, "ray_valley_waiting_requests") == 0
    assert value(seen, "ray_valley_cache_bytes", cache="sampler") > 0


def test_the_access_log_has_one_line_per_request_with_its_stages(asked: dict[str, int]) -> None:
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
    text = "\n".join(path.read_text() for path in logs.glob("replica_*Ingress*.log"))
    lines = {name: re.findall(rf" {name} POST .*", text) for name in (*asked, "left")}
    assert {name: len(found) for name, found in lines.items()} == dict.fromkeys(lines, 1)
    details = {name: dict(re.findall(r"(\w+)=(\S+)", line)) for name, (line,) in lines.items()}
    stages = {"ttft_ms", "fetch_ms", "queue_ms", "media_ms", "prefill_ms", "answer_ms"}
    assert stages | {"decode_ms", "encode_ms"} <= details["cold"].keys()
    assert (details["cold"]["cache"], details["warm"]["cache"]) == ("none", "decoder")
    assert stages <= details["warm"].keys()
    assert not {"decode_ms", "encode_ms"} & details["warm"].keys(), "the cache costs nothing"
    assert "cache" not in details["text"]
    cold = {name: float(value) for name, value in details["cold"].items() if name.endswith("_ms")}
    assert cold["decode_ms"] + cold["encode_ms"] <= cold["media_ms"]
    assert cold["queue_ms"] + cold["media_ms"] + cold["prefill_ms"] <= cold["ttft_ms"]
    outcomes = {name: (found["outcome"], found.get("reason")) for name, found in details.items()}
    assert outcomes == {
        "cold": ("answered", None),
        "warm": ("answered", None),
        "text": ("answered", None),
        "unknown": ("refused", "model_not_found"),
        "broken": ("refused", "media_not_recognised"),
        "left": ("aborted", None),
    }
