"""The Serve application: ServeConfig → its deployments, and a way to run them from Python.

``build`` is what a Serve YAML names. Models are opened by replicas, never here.
"""

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from valley_ray.config import validate_config
from valley_ray.engine.open import check_engine
from valley_ray.errors import ConfigError, PortInUseError, UnavailableError, ValleyError
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.decoder import LanguageDecoder
from valley_ray.serve.encoder import VisionEncoder
from valley_ray.serve.ingress import Ingress, listening_host
from valley_ray.serve.keys import Keys, check_exposure, read_keys
from valley_ray.serve.sampler import FrameSampler
from valley_ray.serve.weights_version import weights_version
from valley_ray.storage import storage_root

logger = logging.getLogger(__name__)

APP_NAME = "valley"
_ROUTER = "valley_ray.serve.router:MediaRouter"


class BuildError(ConfigError, RayServeException):
    """A ServeConfig that cannot be served. Serve prints its exceptions as one line, others with a traceback."""


def build(args: ServeConfig | Mapping[str, Any]) -> serve.Application:
    """Check the configuration and bind the deployments; raises BuildError with one line that says what to do."""
    config, keys = _check(args)

    # How busy a replica that knows a video may be, in requests, before another one gets to know it too.
    slack = {"decoder": max(1, config.num_slots // 2), "encoder": config.encode_batch_size, "sampler": 2}

    def deployment(kind: type[Any], size: str) -> serve.Deployment:
        router = None
        if size in slack:
            router = {"request_router_class": _ROUTER, "request_router_kwargs": {"slack": slack[size]}}
        return serve.deployment(kind, **getattr(config, size).options(kind.__name__, router=router))

    if config.shape == "colocated":
        for ignored in {"encoder", "sampler"} & config.model_fields_set:
            logger.warning("%s sizes nothing where shape is colocated; leave it out, size the decoder", ignored)
        decoder = deployment(LanguageDecoder, "decoder").bind(config)
    else:
        sampler = deployment(FrameSampler, "sampler").bind(config)
        encoder = deployment(VisionEncoder, "encoder").bind(config, sampler)
        decoder = deployment(LanguageDecoder, "decoder").bind(config, encoder)
    return deployment(Ingress, "ingress").bind(config, decoder, keys)


def _check(args: ServeConfig | Mapping[str, Any]) -> tuple[ServeConfig, Keys]:
    """Paths are made absolute and keys read here, since replicas may start in another folder and environment."""
    try:
        config = args if isinstance(args, ServeConfig) else validate_config(ServeConfig, args, source="args")
        _check_folder(config)
        _check_adapters(config)
        check_engine(config.engine)
        keys = read_keys(config.api_keys_file)
        # `serve run` and `serve deploy` build where Serve runs. The ingress looks again: others build before that.
        check_exposure(listening_host() or "localhost", keys, allow_no_keys=config.allow_no_keys)
        versions = _versions(config)
    except ValleyError as error:
        raise BuildError(str(error)) from None
    roots = tuple(root.absolute() for root in config.allow_roots)
    files = config.files.model_copy(update={"folder": storage_root() / config.files.folder})
    adapters = {name: folder.absolute() for name, folder in config.adapters.items()}
    absolute = {"model": config.model.absolute(), "adapters": adapters, "allow_roots": roots, "files": files}
    return config.model_copy(update={**absolute, **versions, "model_name": config.served_name}), keys


def _versions(config: ServeConfig) -> dict[str, Any]:
    """Computed once: replicas that start at different times must agree on what they have."""
    adapters = {name: weights_version(folder) for name, folder in config.adapters.items()}
    return {"weights_version": weights_version(config.model), "adapter_versions": adapters}


def _check_folder(config: ServeConfig) -> None:
    """What can be seen without opening the model, so that it is said at once and not by a replica, minutes later."""
    is_adapter = not (config.model / "config.json").is_file()
    if is_adapter and not (config.model / "adapter_config.json").is_file():
        raise ConfigError(
            f"no model at {config.model} (seen from {Path.cwd()}): run `make quickstart`, which makes models/nano, "
            "or set `model` to another folder"
        )
    stem = "adapter_model" if is_adapter else "model"
    if not config.allow_bin and not any(config.model.glob(f"{stem}*.safetensors")):
        raise ConfigError(
            f"{config.model} has no {stem}*.safetensors, and a crafted pickle (.bin) may run code: set allow_bin: true "
            "if you trust the folder, or write it anew with `valley-ray convert`"
        )


def _check_adapters(config: ServeConfig) -> None:
    """Whether they fit the model is seen by the decoders, which have its weights."""
    for name, folder in config.adapters.items():
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"adapters.{name}: no adapter_config.json in {folder}; name a folder that training wrote")
        if (folder / "config.json").is_file():
            raise ConfigError(
                f"adapters.{name}: {folder} is a whole model; serve it as `model`, or name its adapter alone"
            )
        if not config.allow_bin and not any(folder.glob("adapter_model*.safetensors")):
            raise ConfigError(
                f"adapters.{name}: {folder} has no adapter_model*.safetensors, and a crafted pickle (.bin) may run "
                "code: set allow_bin: true if you trust the folder"
            )


@dataclass(frozen=True)
class ServedApp:
    """A running application."""

    url: str
    """For example http://127.0.0.1:8000."""
    model_name: str
    """What requests say as `model`."""


@contextmanager
def run(
    config: ServeConfig, *, host: str = "127.0.0.1", port: int = 8000, log_level: str = "INFO"
) -> Iterator[ServedApp]:
    """Serve on the Ray that this process is connected to, until the block ends; `port` 0 picks a free one.

    Above INFO, `log_level` leaves Serve's access log out too.

    The app answers when the block starts. Meant for a local Ray of one's own: it brings up Serve and takes it down.

    Raises PortInUseError, BuildError, ConfigError where there is no Ray or Serve already runs on it, or
    UnavailableError with the reason where a deployment does not come up.
    """
    if not ray.is_initialized():
        raise ConfigError("no Ray in this process; call ray.init(address='local') first")
    app = build(config)
    check_exposure(host, read_keys(config.api_keys_file), allow_no_keys=config.allow_no_keys)
    port = free_port(host, port)
    if _serve_runs():
        raise ConfigError("Serve already runs on this Ray; use `serve deploy` to change what it serves")
    logs = LoggingConfig(log_level=log_level, enable_access_log=log_level == "INFO")
    serve.start(
        proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port), logging_config=logs
    )
    try:
        _deploy(app, logs)
        yield ServedApp(f"http://{host}:{port}", config.served_name)
    finally:
        serve.shutdown()


def _deploy(app: serve.Application, logs: LoggingConfig) -> None:
    try:
        serve.run(app, name=APP_NAME, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        # Serve's error names deployments only; why they failed is the last line of the traceback in their status.
        deployments = serve.status().applications[APP_NAME].deployments.values()
        causes = {one.message.strip().splitlines()[-1] for one in deployments if one.message.strip()}
        reason = "; ".join(sorted(cause.partition(": ")[2] or cause for cause in causes)) or str(error)
        raise UnavailableError(f"the server did not come up: {reason}") from error


def _serve_runs() -> bool:
    return bool(serve.status().proxies)


def free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, a free one for 0; raises PortInUseError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the proxy does, so that a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUseError(f"cannot listen on {host}:{port} ({error.strerror}); choose another port") from error
        chosen: int = probe.getsockname()[1]
    return chosen
