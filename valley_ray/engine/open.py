"""Which engine runs the model: a name of a configuration → an Engine over an opened core.

Importing this module loads neither torch nor vLLM.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from valley_ray.config import Config
from valley_ray.engine.engine import Engine
from valley_ray.errors import ConfigError

if TYPE_CHECKING:
    from valley_ray.engine.slots import LanguageCore

EngineKind = Literal["slots", "vllm"]
"""`slots` is the house's own and always there; `vllm` is the extra of that name."""


class VllmSettings(Config):
    """What `engine: vllm` leaves to its user; everything else follows from the model and from the server's settings."""

    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of each GPU that weights and cache take together."""
    cache_bytes: int | None = Field(default=None, ge=1)
    """Keys and values of all requests, bytes; None: on a GPU what `gpu_memory_utilization` leaves, on a CPU what all
    slots need at full length and as much again for prompts that come back, up to a quarter of the memory."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share every layer."""
    compile: bool = True
    """Compile the model at start: faster tokens for a start that takes longer by seconds to minutes."""


def check_engine(kind: EngineKind) -> None:
    """Raise ConfigError where the engine's packages are not installed; imports none of them."""
    if kind == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "engine vllm needs vLLM, which is not installed: pip install 'valley-ray[vllm]' for an NVIDIA GPU "
            "(docs/serving.md has the recipe for CPUs), or choose the engine slots"
        )


def open_engine(
    kind: EngineKind,
    core: "LanguageCore",
    *,
    num_slots: int = 16,
    max_length: int = 2048,
    vllm: VllmSettings | None = None,
    keep_weights: bool = True,
) -> Engine:
    """The engine called `kind` over `core`; `close` it in the end.

    Args:
        kind: which one.
        core: embeddings and language model.
        num_slots: requests that run at once.
        max_length: tokens of one request, prompt and answer together.
        vllm: its settings; other engines have none.
        keep_weights: False lets an engine with weights of its own drop the language model's here, where only the
            input embeddings, projector and pooling stay usable.

    Raises:
        ConfigError: the engine is not installed, or cannot serve the model.
    """
    check_engine(kind)
    if kind == "vllm":
        from valley_ray.engine.vllm import VllmEngine

        return VllmEngine(
            core, num_slots=num_slots, max_length=max_length, settings=vllm or VllmSettings(), keep_weights=keep_weights
        )
    from valley_ray.engine.slots import SlotEngine

    return SlotEngine(core, num_slots=num_slots, max_length=max_length)
