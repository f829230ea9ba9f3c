"""The files of serve_configs/ as Serve and the house read them, and the sizes that a deployment can be given."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from valley_ray.config import validate_config
from valley_ray.errors import ConfigError
from valley_ray.serve.app import build
from valley_ray.serve.config import ServeConfig, read_serve_file
from valley_ray.serve.deployment_config import AutoscalingSettings, DeploymentConfig

FOLDER = Path(__file__).parents[3] / "serve_configs"
PATHS = sorted(FOLDER.glob("*.yaml"))
SIZES = ("ingress", "decoder", "encoder", "sampler")
NAMES = {"Ingress": "ingress", "LanguageDecoder": "decoder", "VisionEncoder": "encoder", "FrameSampler": "sampler"}


def deployments_of(app: serve.Application) -> dict[str, serve.Deployment]:
    """All deployments of an application, by name."""
    found, to_see = {}, [app]
    while to_see:
        bound = to_see.pop()._bound_deployment
        found[bound.name] = bound
        to_see += [value for value in bound.init_args if isinstance(value, serve.Application)]
    return found


def test_there_is_one_file_per_shape() -> None:
    names = {"valley", "valley-7b", "valley-13b", "valley-chinese", "valley-vllm", "valley-cluster"}
    assert {path.stem for path in PATHS} == names


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_serve_and_the_house_read_the_file_and_build_what_it_says(path: Path, tiny_valley: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.http_options.host == "127.0.0.1", "an example must not open a server to a network"
    config, http = read_serve_file(path)
    assert (http.host, http.port) == (schema.http_options.host, schema.http_options.port)
    # The engine may not be installed, nor the model here.
    app = build(config.model_copy(update={"model": tiny_valley, "engine": "slots"}))
    deployments = deployments_of(app)
    assert set(deployments) == set(NAMES)
    for name, deployment in deployments.items():
        size: DeploymentConfig = getattr(config, NAMES[name])
        actor = deployment.ray_actor_options
        assert (actor["num_cpus"], actor["num_gpus"]) == (size.num_cpus, size.num_gpus)
        assert actor["label_selector"] == size.labels
        scaling = deployment._deployment_config.autoscaling_config
        assert (scaling is None) == (size.autoscaling is None)
        if size.autoscaling is not None:
            assert scaling.max_replicas == size.autoscaling.max_replicas
            assert scaling.target_ongoing_requests < size.max_ongoing_requests, "it would never be passed"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_unknown_key_is_refused_wherever_it_stands(path: Path, tmp_path: Path) -> None:
    places: list[tuple[Any, ...]] = [(), ("http_options",), ("applications", 0), ("applications", 0, "args")]
    args = yaml.safe_load(path.read_text())["applications"][0]["args"]
    places += [("applications", 0, "args", key) for key, value in args.items() if isinstance(value, dict)]
    for place in places:
        values = yaml.safe_load(path.read_text())
        node = values
        for key in place:
            node = node[key]
        node["num_replica"] = 2
        changed = tmp_path / path.name
        changed.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=r"unknown key .*num_replica"):
            read_serve_file(changed)


def test_one_machine_has_the_resources_that_its_files_ask_for() -> None:
    for path in PATHS:
        config, _ = read_serve_file(path)
        sizes = [getattr(config, name) for name in SIZES]
        if path.stem == "valley-cluster":
            assert all(size.labels for name, size in zip(SIZES, sizes, strict=True) if name != "ingress")
            continue
        assert not any(size.labels or size.resources or size.autoscaling for size in sizes)
        assert sum(size.num_gpus * size.num_replicas for size in sizes) <= 1
        with_new_ones = [1 + size.max_surge_percent / 100 for size in sizes]
        assert sum(size.num_gpus * share for size, share in zip(sizes, with_new_ones, strict=True)) <= 1, path
        if path.stem == "valley":
            cpus = sum(size.num_cpus * share for size, share in zip(sizes, with_new_ones, strict=True))
            assert cpus <= 2, "two cores, old and new replicas together"


def test_replicas_are_counted_or_scaled_not_both() -> None:
    scaled = DeploymentConfig(autoscaling=AutoscalingSettings(max_replicas=3))
    assert "num_replicas" not in scaled.options("d")
    wrong = {"decoder": {"num_replicas": 2, "autoscaling": {"max_replicas": 3}}}
    with pytest.raises(ConfigError, match=r"decoder: num_replicas and autoscaling exclude each other"):
        validate_config(ServeConfig, wrong, source="args")
    with pytest.raises(ValidationError, match="min_replicas must not be over max_replicas"):
        AutoscalingSettings(min_replicas=2, max_replicas=1)


def test_labels_that_ray_could_not_read_are_refused() -> None:
    DeploymentConfig(labels={"valley-node": "in(gpu, big)", "ray.io/zone": "!a"})
    with pytest.raises(ValidationError, match="no label selector of Ray"):
        DeploymentConfig(labels={"valley-node": "in(gpu"})


def test_a_replica_that_goes_has_the_time_to_finish_and_its_follower_comes_first() -> None:
    options = DeploymentConfig(drain_timeout_s=30).options("d")
    assert (options["graceful_shutdown_timeout_s"], options["max_surge_percent"]) == (30, 100)


def test_a_size_that_the_colocated_shape_ignores_is_said(tiny_valley: Path, caplog: pytest.LogCaptureFixture) -> None:
    for encoder, said in (({"encoder": {"num_gpus": 1}}, ["encoder"]), ({}, [])):
        caplog.clear()
        app = build({"model": str(tiny_valley), "shape": "colocated", **encoder})
        assert set(deployments_of(app)) == {"Ingress", "LanguageDecoder"}
        assert [record.message.split()[0] for record in caplog.records] == said
