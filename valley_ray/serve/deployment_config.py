"""Size and place of one deployment, as a user writes them, and the arguments of Serve that they become."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from valley_ray.config import Config


class AutoscalingSettings(Config):
    """How many replicas the requests of one deployment, running and waiting, are worth."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest; 0: the first request after a pause waits until a replica is up."""
    max_replicas: int = Field(ge=1)
    """Most; replicas that no node has room for wait for Ray's autoscaler to bring one."""
    target_ongoing_requests: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    """Requests per replica, running and waiting, that replicas are added or taken away to reach."""
    look_back_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Requests are averaged over this time, seconds."""
    upscale_delay_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """How long more must be needed before replicas are added, seconds."""
    downscale_delay_s: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    """How long fewer must be enough before replicas end, seconds; their caches end with them."""

    @model_validator(mode="after")
    def _check_order(self) -> "AutoscalingSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must not be over max_replicas, got {self.min_replicas=} {self.max_replicas=}"
            )
        return self

    def options(self) -> dict[str, Any]:
        """Serve's `autoscaling_config`."""
        return {**self.model_dump(exclude={"look_back_s"}), "look_back_period_s": self.look_back_s}


class DeploymentConfig(Config):
    """Size of one deployment. Fractions of CPUs are reservations, not limits."""

    num_replicas: int = Field(default=1, ge=1)
    """Replicas that run at once."""
    autoscaling: AutoscalingSettings | None = None
    """Replicas by the number of requests, instead of `num_replicas`; None: always as many."""
    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs reserved per replica."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs reserved per replica; above 0 the replica's model lives on the GPU."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Other resources of Ray reserved per replica, as `ray start --resources` names them on nodes."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray's label selector: replicas run only on nodes whose labels (`ray start --labels`) fit."""
    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests that one replica works on at once."""
    max_queued_requests: int = Field(default=64, ge=-1)
    """Requests that wait per calling replica before more are refused with 429; -1: no limit."""
    drain_timeout_s: float = Field(default=120.0, ge=0, allow_inf_nan=False)
    """How long a replica that has to go may finish its requests, seconds; those still running then fail."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Room for new replicas beside old ones while a redeploy replaces them, percent of all. 0, where resources are
    short: an old one ends first, and with a single replica requests wait until the new one is up."""

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        if not labels:
            return labels
        # Imported here: a command line that only reads a configuration should not wait for Ray.
        from ray.serve.schema import RayActorOptionsSchema

        try:
            RayActorOptionsSchema(label_selector=labels)
        except ValidationError as error:
            raise ValueError(f"no label selector of Ray ({error.errors()[0]['msg']})") from error
        return labels

    @model_validator(mode="after")
    def _check_one_size(self) -> "DeploymentConfig":
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling exclude each other; remove one of them")
        return self

    def options(self, name: str, *, router: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Arguments of `serve.deployment`; `router`: its `request_router_config`, None for Serve's own."""
        actor = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        size: dict[str, Any] = {"num_replicas": self.num_replicas}
        if self.autoscaling is not None:
            size = {"autoscaling_config": self.autoscaling.options()}
        return {
            "name": name,
            **size,
            "ray_actor_options": {**actor, "resources": self.resources, "label_selector": self.labels},
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "max_surge_percent": self.max_surge_percent,
            "graceful_shutdown_timeout_s": self.drain_timeout_s,
            # How often a leaving replica looks whether its requests are done; Serve's 2 s add up over the deployments.
            "graceful_shutdown_wait_loop_s": 0.25,
            # By this a replica that died is noticed and replaced; where it was the only one, requests wait for it.
            "health_check_period_s": 2.0,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
            **({} if router is None else {"request_router_config": dict(router)}),
        }

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where a replica's model lives."""
        return "cuda" if self.num_gpus > 0 else "cpu"
