"""The prompt styles by name: the one place that knows them all."""

from collections.abc import Mapping

from valley_ray.chat import encode, upstream, upstream_completion, upstream_serving
from valley_ray.chat.style import Style
from valley_ray.chat.templates import PromptStyle

STYLES: Mapping[PromptStyle, Style] = {
    "valley": encode,
    "upstream-train": upstream,
    "upstream-build-inputs": upstream_completion,
    "upstream-serve": upstream_serving,
}
"""One module per style."""
