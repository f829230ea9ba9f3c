"""Whether a Ray of one node has what the deployments of a ServeConfig reserve: said at once, before anything starts.

Serve would wait for another node for ever, and a replica that waits takes its whole drain time to end.
"""

import re
from collections import Counter
from collections.abc import Mapping

from valley_ray.errors import ConfigError
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.deployment_config import DeploymentConfig


def check_capacity(config: ServeConfig, *, resources: Mapping[str, float], labels: Mapping[str, str]) -> None:
    """Compare what all replicas reserve together, the fewest where they autoscale, with the node's total.

    Args:
        config: What is to be served.
        resources: The node's, by Ray's names, as `ray.cluster_resources()` gives them.
        labels: The node's, as `ray.nodes()` gives them.

    Raises:
        ConfigError: A resource is short, or a label selector does not fit; names the settings that ask for it.
    """
    names = ("ingress", "decoder") if config.shape == "colocated" else ("ingress", "decoder", "encoder", "sampler")
    sizes: dict[str, DeploymentConfig] = {name: getattr(config, name) for name in names}
    for name, size in sizes.items():
        for key, selector in size.labels.items():
            if not _fits(selector, labels.get(key)):
                raise ConfigError(
                    f"{name}.labels asks for a node with {key}: {selector}, and this machine's Ray has no such label; "
                    "leave it out, or set RAY_ADDRESS to a cluster whose nodes have it"
                )
    needs = {name: _reserved(size) for name, size in sizes.items()}
    for resource in sorted(set[str]().union(*needs.values())):
        total, there = sum(need[resource] for need in needs.values()), resources.get(resource, 0.0)
        if round(total - there, 4) > 0:  # Ray counts in ten thousandths
            asked = ", ".join(f"{name} {need[resource]:g}" for name, need in needs.items() if need[resource])
            raise ConfigError(
                f"the replicas reserve {total:g} {resource} ({asked}), and this machine's Ray has {there:g}; "
                "make them fewer or smaller, or set RAY_ADDRESS to a cluster that has as many"
            )


def _reserved(size: DeploymentConfig) -> Counter[str]:
    num_replicas = size.num_replicas if size.autoscaling is None else size.autoscaling.min_replicas
    each = {"CPU": size.num_cpus, "GPU": size.num_gpus, **size.resources}
    need: Counter[str] = Counter()
    for resource, amount in each.items():
        # Counters are typed for whole numbers and hold any.
        need[resource] += num_replicas * amount  # type: ignore[assignment]
    return need


def _fits(selector: str, label: str | None) -> bool:
    """Ray's selectors: `value`, `!value`, `in(a, b)` and `!in(a, b)`; a node without the label fits negated ones."""
    values = {value.strip() for value in re.sub(r"^!?(in\((.*)\)|(.*))$", r"\2\3", selector.strip()).split(",")}
    return (label in values) != selector.strip().startswith("!")
