"""ServeConfig: what a user writes under `args` of a Serve YAML; and that YAML as far as `valley-ray serve` takes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from valley_ray.config import COMMAND_LINE, Config, apply_overrides, read_yaml, validate_config
from valley_ray.engine.open import EngineKind, VllmSettings
from valley_ray.media.decode import Backend
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import SandboxLimits
from valley_ray.serve.deployment_config import DeploymentConfig
from valley_ray.serve.files import FilesConfig
from valley_ray.serve.rate_limit import RateLimit

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class ServeConfig(Config):
    """One served model: what it may read, how it answers, how each deployment is sized."""

    model: Path = Path("models/nano")
    """Model folder; a relative one is looked up where `serve run` was started."""
    model_name: str | None = Field(default=None, min_length=1)
    """The name that requests say; None: the last part of `model`."""
    allow_bin: bool = False
    """Open weights in pickled .bin files, as upstream released them; safetensors need no such trust."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the weights; None: float32 on a CPU, the folder's own on a GPU."""
    adapters: dict[AdapterName, Path] = Field(default_factory=dict)
    """LoRA folders on top of the model, by the names that requests put behind its own: `model: NAME:ADAPTER`."""
    max_adapters: int = Field(default=4, ge=1)
    """Most adapters that one replica keeps in memory."""

    allow_roots: tuple[Path, ...] = ()
    """Folders whose files requests may name by path or file:// URI (on the machine of the replicas). Empty: none."""
    max_media_bytes: int = Field(default=64 * 2**20, ge=1)
    """Largest media file, bytes; a request's body may be a third larger (base64) plus text."""
    max_media: int = Field(default=16, ge=1)
    """Most videos and images in one request."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts whose http(s) URLs requests may name, redirects included. Empty: no URLs."""
    allow_private_addresses: bool = False
    """Fetch from allowed hosts in the private network or on this machine too."""
    fetch_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Longest download of one URL, seconds."""
    body_timeout_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Longest that the body of a request may take to arrive, seconds; after a tenth of it without a byte it is given
    up too."""
    files: FilesConfig = FilesConfig()
    """Files that clients upload."""

    api_keys_file: Path | None = None
    """File with API keys, one a line (`KEY` or `NAME KEY`), beside those in $VALLEY_API_KEYS; no key at all: anybody
    may ask, which only a server on a loopback address does by itself."""
    allow_no_keys: bool = False
    """Answer a whole network without API keys, for example behind a gateway that checks who asks."""
    rate_limit: RateLimit = RateLimit()
    """What each key may ask for."""
    cors_origins: tuple[str, ...] = ()
    """Origins such as https://example.org whose web pages may ask from a browser; "*": any. Empty: none."""

    sandbox: SandboxLimits = SandboxLimits()
    """Time and memory of decoding one file."""
    video_decoder: Backend = "pyav"
    """Reader of videos: pyav, or decord for upstream's pixels with its faults (cut clips, HEVC, 10 bits)."""

    sampling: FrameSampling | None = None
    """Frames of a video where the request does not say; None: the model folder's own."""
    max_frames: int = Field(default=64, ge=1)
    """Most frames per video that a request may ask for with `num_frames`, or get with `fps`."""
    default_max_tokens: int = Field(default=128, ge=1)
    """New tokens where the request does not say (fewer where they would not fit)."""
    max_choices: int = Field(default=8, ge=1)
    """Most answers that one request may ask for with `n`."""

    engine: EngineKind = "slots"
    """What makes the tokens: slots, the house's own, or vllm, an extra for GPUs and many requests at once."""
    vllm: VllmSettings | None = None
    """Settings of the engine vllm; None: its defaults."""
    num_slots: int = Field(default=16, ge=1)
    """Requests that one decoder advances together."""
    max_length: int | None = Field(default=None, ge=2)
    """Prompt and answer together, tokens; None: the model folder's own."""
    encode_batch_size: int = Field(default=8, ge=1)
    """Videos that go through the vision tower together."""
    encode_wait_s: float = Field(default=0.005, ge=0)
    """How long the encoder waits for a fuller batch, seconds."""
    sampler_cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Frames kept by each sampler replica, bytes."""
    encoder_cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """What the tower made of frames, kept by each encoder replica, bytes."""
    decoder_cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Visual tokens kept by each decoder replica, bytes."""

    shape: Literal["split", "colocated"] = "split"
    """split: samplers, encoders and decoders are deployments of their own. colocated: each decoder replica has a
    sampler and an encoder in its process and opens the weights once; `encoder` and `sampler` then size nothing."""
    ingress: DeploymentConfig = DeploymentConfig(max_ongoing_requests=128, max_queued_requests=128)
    """The HTTP front."""
    decoder: DeploymentConfig = DeploymentConfig()
    """LanguageDecoder replicas."""
    encoder: DeploymentConfig = DeploymentConfig()
    """VisionEncoder replicas."""
    sampler: DeploymentConfig = DeploymentConfig()
    """FrameSampler replicas."""

    weights_version: str = ""
    """Set where the application is built: what is computed with other weights is never mixed in."""
    adapter_versions: Mapping[str, str] = Field(default_factory=dict)
    """Set where the application is built: the same of every adapter."""

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if self.engine == "slots":
            if self.vllm is not None:
                raise ValueError("vllm are settings of the engine vllm, but engine is slots; set engine: vllm")
            return self
        if self.adapters:
            raise ValueError("the engine vllm serves no adapters; merge them (valley-ray merge-lora) or use slots")
        num_gpus = self.vllm.tensor_parallel_size if self.vllm is not None else 1
        if num_gpus > 1 and self.decoder.num_gpus < num_gpus:
            raise ValueError(f"vllm.tensor_parallel_size={num_gpus} needs decoder.num_gpus={num_gpus} or more")
        return self

    @property
    def served_name(self) -> str:
        """The model name that requests say."""
        return self.model_name or self.model.name

    def name_under(self, adapter: str | None) -> str:
        """The name that requests say for the model under one of its adapters, or for the model alone."""
        return self.served_name if adapter is None else f"{self.served_name}:{adapter}"

    def version_of(self, adapter: str | None) -> str:
        """What visual tokens are made with: the model's version, or that of the model under an adapter."""
        if adapter is None:
            return self.weights_version
        # The name too: two adapters may have files of the same sizes and times.
        return f"{self.weights_version}+{adapter}={self.adapter_versions.get(adapter, '')}"


class HttpOptions(Config):
    """Where the HTTP front listens."""

    host: str = "127.0.0.1"
    """Address; 0.0.0.0 for every interface."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port; 0 picks a free one."""


class ApplicationEntry(Config):
    """One application of a Serve YAML."""

    name: str = "valley"
    """Shown in Serve's status."""
    route_prefix: Literal["/"] = "/"
    """The API's paths stand in its clients."""
    import_path: Literal["valley_ray.serve.app:build"]
    """What makes the application."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of ServeConfig."""


class ServeFile(Config):
    """A Serve YAML of one application; what only `serve run` and `serve deploy` understand is an unknown key here."""

    proxy_location: Literal["HeadOnly"] = "HeadOnly"
    """One HTTP front, on the head node."""
    http_options: HttpOptions = HttpOptions()
    """Where it listens."""
    applications: tuple[ApplicationEntry]
    """Exactly one."""


def read_serve_file(path: Path | None, overrides: Sequence[str] = ()) -> tuple[ServeConfig, HttpOptions]:
    """Read a Serve YAML (None: all defaults) and apply ``key=value`` overrides to its `args`; raises ConfigError."""
    http, values = HttpOptions(), dict[str, Any]()
    if path is not None:
        file = validate_config(ServeFile, read_yaml(path), source=str(path))
        http, values = file.http_options, file.applications[0].args
    apply_overrides(values, overrides)
    return validate_config(ServeConfig, values, source=str(path or COMMAND_LINE), overrides=overrides), http
