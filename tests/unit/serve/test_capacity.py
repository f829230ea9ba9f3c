"""What a node of a given size is asked for in vain, without Ray."""

import re
from pathlib import Path

import pytest

from valley_ray.errors import ConfigError
from valley_ray.serve.capacity import check_capacity
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.deployment_config import AutoscalingSettings, DeploymentConfig

LAPTOP = {"CPU": 2.0, "memory": 8e9}


def test_the_default_sizes_fit_a_single_core() -> None:
    check_capacity(ServeConfig(model=Path("any")), resources={"CPU": 1.0}, labels={})


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"num_gpus": 1}, "1 GPU (decoder 1), and this machine's Ray has 0"),
        ({"num_cpus": 0.5, "num_replicas": 3}, "2.25 CPU (ingress 0.25, decoder 1.5, encoder 0.25, sampler 0.25), and"),
        ({"resources": {"places": 1}}, "1 places (decoder 1), and this machine's Ray has 0"),
        ({"labels": {"valley-node": "gpu"}}, "decoder.labels asks for a node with valley-node: gpu, and"),
    ],
)
def test_what_no_replica_would_get_is_said_with_the_setting_that_asks(size: dict[str, object], said: str) -> None:
    config = ServeConfig(model=Path("any"), decoder=DeploymentConfig.model_validate(size))
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_capacity(config, resources=LAPTOP, labels={})


def test_only_what_is_deployed_counts_and_the_fewest_of_those_that_autoscale() -> None:
    grows = DeploymentConfig(num_cpus=1, autoscaling=AutoscalingSettings(min_replicas=1, max_replicas=9))
    config = ServeConfig(
        model=Path("any"), shape="colocated", decoder=grows, encoder=DeploymentConfig(num_gpus=1, labels={"a": "b"})
    )
    check_capacity(config, resources=LAPTOP, labels={})


@pytest.mark.parametrize(
    ("selector", "fitting"),
    [("a", {"a"}), ("!a", {"b", "c", None}), ("in(a, b)", {"a", "b"}), ("!in(a,b)", {"c", None})],
)
def test_selectors_fit_as_ray_reads_them(selector: str, fitting: set[str | None]) -> None:
    config = ServeConfig(model=Path("any"), decoder=DeploymentConfig(labels={"kind": selector}))
    for label in ("a", "b", "c", None):
        labels = {} if label is None else {"kind": label}
        if label in fitting:
            check_capacity(config, resources=LAPTOP, labels=labels)
        else:
            with pytest.raises(ConfigError, match=r"decoder\.labels"):
                check_capacity(config, resources=LAPTOP, labels=labels)
