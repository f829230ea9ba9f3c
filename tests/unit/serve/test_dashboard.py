"""The Grafana dashboard's JSON: what Grafana needs to import it. Its metrics against a live scrape: tests/ray."""

import itertools

from dashboard import expressions, labels_of, load, metrics_of

from valley_ray.serve import metrics
from valley_ray.serve.metrics import Histogram

KINDS = {"row", "timeseries", "stat", "heatmap"}
UNITS = {"s", "short", "percent", "percentunit", "reqps", "ops", "bytes"}
"""Ids of units, among those that Grafana knows."""


def test_expressions_are_read_as_prometheus_reads_them() -> None:
    expression = (
        'histogram_quantile(0.95, sum by (le, stage) (rate(a_bucket{x=~"y, by (z)"}[5m]))) / on (k) b_total > bool 1e3'
    )
    assert metrics_of(expression) == {"a_bucket", "b_total"}
    assert labels_of(expression) == {"le", "stage", "x", "k"}
    assert metrics_of("sum(up) without (a) or vector(0)") == {"up"}


def test_the_dashboard_has_what_grafana_needs() -> None:
    dashboard = load()
    # 39 is Grafana 10.4's; newer ones migrate it when it is imported.
    assert dashboard["schemaVersion"] == 39
    assert dashboard["id"] is None
    assert dashboard["uid"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} == KINDS
    for panel in panels:
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]
    source, application = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert application["name"] == "application"


def test_panels_lie_side_by_side_in_the_grid() -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in load()["panels"]]
    for title, place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, title
        assert min(place["w"], place["h"]) > 0, title
    for (title, one), (other_title, other) in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, f"{title!r} lies over {other_title!r}"


def test_every_target_asks_the_chosen_data_source() -> None:
    for panel in load()["panels"]:
        if panel["type"] == "row":
            continue
        unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]
        assert unit in UNITS, panel["title"]
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_expressions_name_declared_metrics_and_their_labels() -> None:
    suffix_of = {metric.name: "_bucket" if isinstance(metric, Histogram) else "" for metric in metrics.ALL}
    declared = {f"ray_{name}{suffix}": name for name, suffix in suffix_of.items()}
    labels = {metric.name: metric.labels for metric in metrics.ALL}
    shown = set()
    for title, expression in expressions():
        ours = {name for name in metrics_of(expression) if name.startswith("ray_valley_")}
        assert ours <= set(declared), f"{title}: {ours - set(declared)}"
        shown |= ours
        for name in ours:
            known = {"application", "deployment", "replica", "le", *labels[declared[name]]}
            assert labels_of(expression) <= known, f"{title}: {labels_of(expression) - known}"
    assert shown == set(declared), f"no panel shows {set(declared) - shown}"
