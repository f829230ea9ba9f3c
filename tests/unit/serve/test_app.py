import os
import shutil
import socket
from pathlib import Path

import pytest
from ray.serve.exceptions import RayServeException

from valley_ray.errors import ConfigError, PortInUseError
from valley_ray.serve import app
from valley_ray.serve.app import _check, build, free_port, run
from valley_ray.serve.config import ServeConfig


def test_a_missing_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no model at models/nano .*make quickstart") as caught:
        build({"model": "models/nano"})
    assert isinstance(caught.value, RayServeException), "Serve prints other errors with a traceback"
    assert "\n" not in str(caught.value)


def test_an_unknown_key_names_the_nearest(tiny_valley: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'decoder\.num_replica'; did you mean 'num_replicas'"):
        build({"model": str(tiny_valley), "decoder": {"num_replica": 2}})


def test_pickled_weights_need_consent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="allow_bin"):
        build({"model": str(tmp_path)})
    build({"model": str(tmp_path), "allow_bin": True})


def test_a_lone_adapter_is_a_model_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no adapter_model\*\.safetensors.*allow_bin: true"):
        build({"model": str(tmp_path)})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    build({"model": str(tmp_path)})


def test_adapter_beside_pickled_weights_does_not_hide_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="allow_bin: true"):
        build({"model": str(tmp_path)})


def test_paths_become_absolute_and_the_name_is_the_folders(tiny_valley: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_valley.parent)
    config, _ = _check({"model": tiny_valley.name, "allow_roots": ["runs"]})
    assert config.model == tiny_valley
    assert config.served_name == tiny_valley.name
    assert config.allow_roots == (tiny_valley.parent / "runs",)


def test_where_serve_listens_on_a_network_building_without_keys_is_refused(
    tiny_valley: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "listening_host", lambda: "0.0.0.0")
    with pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0 without API keys .*http_options\.host") as caught:
        build({"model": str(tiny_valley)})
    assert isinstance(caught.value, RayServeException)
    build({"model": str(tiny_valley), "allow_no_keys": True})


def test_other_weights_settings_or_adapters_are_another_version(tiny_valley: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_valley, tmp_path / "tiny")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    args = {"model": str(folder), "adapters": {"mine": str(adapter)}}
    seen = [_check(args)[0]]
    assert _check(args)[0] == seen[0]
    os.utime(folder / "model.safetensors", (1, 1))
    seen.append(_check(args)[0])
    with (folder / "processor_config.json").open("a") as file:
        file.write("\n")
    seen.append(_check(args)[0])
    assert len({config.version_of(None) for config in seen}) == 3
    (adapter / "adapter_model.safetensors").write_bytes(b"more")
    seen.append(_check(args)[0])
    assert seen[3].version_of(None) == seen[2].version_of(None)
    assert len({config.version_of("mine") for config in seen}) == 4
    with pytest.raises(ConfigError, match=r"adapters\.mine: no adapter_config\.json"):
        _check({"model": str(folder), "adapters": {"mine": str(tmp_path)}})


def test_files_by_path_are_off_by_default() -> None:
    assert ServeConfig().allow_roots == ()


def test_a_port_in_use_is_named_and_zero_picks_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port} .*choose another port"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


def test_run_asks_for_a_ray_first(tiny_valley: Path) -> None:
    with pytest.raises(ConfigError, match=r"ray\.init"), run(ServeConfig(model=tiny_valley)):
        pass
