"""`engine: vllm` in a server's settings: what does not go together is said before anything starts."""

from pathlib import Path

import pytest

from valley_ray.config import validate_config
from valley_ray.engine import open as open_module
from valley_ray.errors import ConfigError
from valley_ray.serve.app import BuildError, build
from valley_ray.serve.config import ServeConfig


def test_settings_that_the_engine_cannot_meet_are_refused() -> None:
    for values, complaint in (
        ({"vllm": {}}, "set engine: vllm"),
        ({"engine": "vllm", "adapters": {"red": "runs/red"}}, "merge them"),
        ({"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}, "needs decoder.num_gpus=2"),
        ({"engine": "sglang"}, "engine"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            validate_config(ServeConfig, values, source="here")
    config = {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}, "decoder": {"num_gpus": 2}}
    assert validate_config(ServeConfig, config, source="here").vllm is not None


def test_a_server_whose_engine_is_not_installed_is_not_built(
    tiny_valley: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_module, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="pip install 'valley-ray"):
        build({"model": tiny_valley, "engine": "vllm"})
