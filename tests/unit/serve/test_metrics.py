"""The declared metrics: names and units as Prometheus wants them, buckets, and silence outside of replicas."""

import re
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from valley_ray.serve import metrics
from valley_ray.serve.metrics import Counter, Gauge, Histogram

GUIDE = Path(__file__).parents[3] / "docs" / "serving.md"


def test_names_end_in_their_unit() -> None:
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    for metric in metrics.ALL:
        assert re.fullmatch(r"valley_[a-z]+(_[a-z]+)*", metric.name)
        ending = {Counter: "_total", Gauge: ("_bytes", "_requests")}.get(type(metric), "_seconds")
        assert metric.name.endswith(ending), metric.name
        assert metric.description.endswith("."), metric.name
        # Ray sets these itself.
        assert not set(metric.labels) & {"application", "deployment", "replica", "route"}


def test_buckets_reach_from_milliseconds_to_minutes() -> None:
    for metric in metrics.ALL:
        if isinstance(metric, Histogram):
            assert all(low < high for low, high in pairwise(metric.buckets))
            assert metric.buckets[0] == 0.001
            assert metric.buckets[-1] >= (2.5 if metric is metrics.TOKEN_GAP_SECONDS else 300)


def test_a_process_that_is_no_replica_records_nothing() -> None:
    counter, gauge, seconds = Counter("a_total", "A."), Gauge("a_requests", "A."), Histogram("a_seconds", "A.")
    counter.add()
    gauge.set(3)
    seconds.observe(0.5)
    assert not any(metric._of_ray for metric in (counter, gauge, seconds))


def test_gauges_are_said_again_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[float, dict[str, str]]] = []
    again = threading.Event()

    class OfRay:
        def set(self, value: float, labels: dict[str, str]) -> None:
            said.append((value, labels))
            if len(said) > 10:
                again.set()

    gauge = Gauge("valley_test_bytes", "A test.", "cache")
    gauge._of_ray = OfRay()
    monkeypatch.setattr(metrics, "ALL", (gauge,))
    monkeypatch.setattr(metrics, "_REPEAT_S", 0.001)
    gauge.set(1, cache="encoder")
    gauge.set(2, cache="decoder")
    gauge.set(3, cache="encoder")
    metrics._repeat_gauges.__wrapped__()
    assert again.wait(10)
    assert said[3:11] == [(3, {"cache": "encoder"}), (2, {"cache": "decoder"})] * 4


def test_the_guide_lists_every_metric_with_its_labels() -> None:
    rows = dict(re.findall(r"^\| `(valley_\w+)` \|([^|]*)\|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(rows) == {metric.name for metric in metrics.ALL}
    for metric in metrics.ALL:
        assert set(re.findall(r"`(\w+)`", rows[metric.name])) == set(metric.labels), metric.name
