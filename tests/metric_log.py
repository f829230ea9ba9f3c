"""What the server's metrics would tell Ray, kept in this process instead."""

from collections import defaultdict

import pytest

from valley_ray.serve.metrics import Counter, Gauge, Histogram, Metric

Series = tuple[str, frozenset[tuple[str, str]]]


class MetricLog:
    """Sums of counters, last values of gauges and all durations, by name and labels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._values: dict[Series, float] = defaultdict(float)
        self._durations: dict[Series, list[float]] = defaultdict(list)
        self.num_calls = 0

        def series(metric: Metric, labels: dict[str, str]) -> Series:
            assert set(labels) == set(metric.labels), f"{metric.name} has other labels than {sorted(labels)}"
            assert all(isinstance(value, str) for value in labels.values())
            self.num_calls += 1
            return metric.name, frozenset(labels.items())

        def add(metric: Counter, amount: float = 1, **labels: str) -> None:
            assert amount >= 0
            self._values[series(metric, labels)] += amount

        def put(metric: Gauge, value: float, **labels: str) -> None:
            self._values[series(metric, labels)] = value

        def observe(metric: Histogram, seconds: float | None, **labels: str) -> None:
            if seconds is not None:
                self._durations[series(metric, labels)].append(seconds)

        monkeypatch.setattr(Counter, "add", add)
        monkeypatch.setattr(Gauge, "set", put)
        monkeypatch.setattr(Histogram, "observe", observe)

    def value(self, metric: Metric, **labels: str) -> float:
        """Of one series; 0 where nobody said anything."""
        return self._values.get((metric.name, frozenset(labels.items())), 0.0)

    def total(self, metric: Metric) -> float:
        """Sum over all labels."""
        return sum(value for (name, _), value in self._values.items() if name == metric.name)

    def durations(self, metric: Metric, **labels: str) -> list[float]:
        """What was observed, in order."""
        return self._durations.get((metric.name, frozenset(labels.items())), [])
