"""The Grafana dashboard as tests read it: panels, expressions, and which metrics and labels an expression names."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[1] / "cluster" / "dashboards" / "valley-serving.json"

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_MATCHERS = re.compile(r"\{([^}]*)\}")
_LABEL = re.compile(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)")
_NAME = re.compile(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()")
_WORDS = frozenset({"and", "or", "unless", "offset", "bool", "inf", "nan"})


def load() -> dict[str, Any]:
    """The dashboard."""
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions() -> Iterator[tuple[str, str]]:
    """(title of the panel or name of the variable, PromQL) of everything that asks for data."""
    dashboard = load()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            yield variable["name"], f"sum by ({label}) ({metric})"


def metrics_of(expression: str) -> set[str]:
    """Names of the series that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\[[^\]]*\]", "", _MATCHERS.sub("", _GROUPING.sub("", bare)))
    return set(_NAME.findall(bare)) - _WORDS


def labels_of(expression: str) -> set[str]:
    """Labels that it filters or groups by."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    grouped = {label.strip() for group in _GROUPING.findall(bare) for label in group.split(",")}
    return {label for part in _MATCHERS.findall(bare) for label in _LABEL.findall(part)} | grouped - {""}
