"""What a training run is: its model, its data, its workers (its stages: stage_config.py). Knows no torch and no Ray."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import Field, field_validator, model_validator

from valley_ray.config import Config
from valley_ray.errors import ConfigError
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.train.stage_config import StageConfig, valley_stages


class DataConfig(Config):
    """Where the samples come from."""

    mode: Literal["overlap", "shards"] = "shards"
    """overlap: the data pipeline runs beside the training and both share `windows_dir`; shards: it ran earlier."""
    windows_dir: Path | None = None
    """Store of committed windows; required for mode shards. In mode overlap the pipeline names it."""
    pipeline: dict[str, Any] | None = None
    """Mode overlap: the settings of `valley_ray.data.pipeline.PipelineConfig`."""
    features: Literal["stored", "computed"] = "stored"
    """stored: where features of this model's tower lie beside the shards (`PrepareConfig.features`), they are read
    instead of frames, and clips without any go through the tower; computed: all clips do."""
    weights: dict[str, Annotated[float, Field(ge=0.01, le=100)]] | None = None
    """Draws of every sample per epoch, by its source (`PipelineConfig.source_names`: the file of records, `NAME#2` for
    a second one of that name; or `SourceConfig.name`): 2 draws each twice, 0.5 half of them in each epoch and the other
    half in the next. Sources not named are drawn once."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "shards" and self.windows_dir is None:
            raise ValueError("mode shards needs windows_dir, the folder that the data pipeline wrote")
        if self.mode == "overlap" and self.pipeline is None:
            raise ValueError("mode overlap needs pipeline, the settings of the data pipeline")
        return self


class TrainConfig(Config):
    """One training run: all stages in one `TorchTrainer.fit`."""

    model: Path
    """Model folder to start from."""
    output: Path
    """Model folder to write; it appears complete or not at all."""
    storage: str = Field(default="runs/train", min_length=1)
    """Where runs are kept, each in a folder of its own with its metrics, curve and checkpoints: a folder that all
    workers' nodes share, or a URL such as s3://bucket/runs. With a URL, metrics and curve are copied to
    `<output>-run` too."""
    run_name: str | None = None
    """Name of the run under `storage`; a name used before continues that run. None makes a new one from the time."""
    data: DataConfig
    """Samples."""
    stages: tuple[StageConfig, ...] = Field(default_factory=valley_stages, min_length=1)
    """Stages, in order."""
    lora: dict[str, Any] | None = None
    """Shape of the adapter that a stage with the part `lora` trains: the settings of
    `valley_ray.model.lora.LoraSettings`; None takes their defaults."""
    allow_random_projector: bool = False
    """Let a first stage train the language model on a projector that no stage has trained; else that is refused."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all workers; the result does not depend on the number of workers."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Samples that one worker runs at a time; divides `global_batch_size`. `pack_tokens` takes its place."""
    pack_tokens: int | None = Field(default=None, ge=16)
    """Tokens that one worker runs at a time: the samples of a global batch stand one behind the other in rows of at
    most so many, without padding, and do not see each other. A longer sample is left out and listed. None: off."""
    length_grouping: bool = False
    """Put samples of like lengths into the same global batch, out of eight batches each: less padding."""
    num_workers: int | tuple[int, int] = 2
    """Training processes; [smallest, largest] number of them: as many as Ray has room for, while nodes come and go."""
    cpus_per_worker: float = Field(default=0.5, ge=0.0001, allow_inf_nan=False)
    """CPUs that a worker reserves. Fractions leave room for the pipeline's tasks: two workers with one CPU each
    starve it on a two-CPU machine."""
    use_gpu: bool = False
    """One GPU per worker."""
    threads_per_worker: int = Field(default=1, ge=1)
    """torch threads of a worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. In bf16 and fp16, 0 is run as 1: the same numbers from a part of the optimizer's memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision that the model computes in; the weights that the optimizer steps, and its state, are float32 always.
    fp16 scales the loss, and leaves a step out whose gradients overflow (they are counted in the metrics)."""
    offload: bool = False
    """Keep optimizer state and float32 weights in the CPU's memory: less of the GPU's, slower steps (ZeRO 1 to 3)."""
    gradient_checkpointing: bool = False
    """Compute the language model's activations again in the backward pass instead of keeping them."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics go beside metrics.jsonl and loss.png, which are always written."""
    peak_flops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """FLOP per second that one worker's device could do at `precision`, which MFU is a share of. None takes what is
    known of the GPU; where nothing is known, there is no MFU."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sample order."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""
    checkpoint_every: int | None = Field(default=200, ge=1)
    """Steps between two checkpoints; None makes none (a killed run then starts again)."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept."""
    keep: Literal["last", "best"] = "last"
    """last: the newest checkpoints are kept; best: the newest, and those with the lowest loss, or with the largest
    `evaluation.best` where there is an evaluation."""
    export_every: int | None = Field(default=None, ge=1)
    """Steps between two model folders written while training, to `<output>-step-<step>`; None writes `output` alone,
    at the end. A file named `export` in the folder of the run asks for one at the next step."""
    max_failures: int = Field(default=3, ge=0)
    """Deaths of workers, or of the controller, from which the run goes on from its latest checkpoint. Nodes that are
    taken away with notice do not count."""
    prefetch_steps: int = Field(default=2, ge=1)
    """Steps whose batches are made ready while one is trained."""
    feature_cache_bytes: int = Field(default=0, ge=0)
    """Memory of each worker for tower features of clips seen before; 0 means off."""
    timeout_s: float = Field(default=600.0, gt=0, le=1e7)
    """Longest wait for another worker (collectives) or for the next committed window."""
    evaluation: EvaluationConfig | None = None
    """Held-out split that checkpoints are measured on beside the training, without stopping it; None: none."""

    @field_validator("storage", mode="before")
    @classmethod
    def _path_or_url(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("run_name")
    @classmethod
    def _one_folder(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.strip(" .") != value or not value or len(value.encode()) > 200 or not value.isprintable():
            raise ValueError(f"expected the name of a folder, without spaces or dots at its ends; got {value!r}")
        if "/" in value or "\\" in value:
            raise ValueError(f"expected the name of one folder, storage is where it lies; got {value!r}")
        return value

    @property
    def min_workers(self) -> int:
        """Fewest training processes that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most training processes that the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"num_workers is a number from 1 on, or [smallest, largest]; got {self.num_workers}")
        if self.evaluation is not None and (self.evaluation.model, self.evaluation.output) != (None, None):
            raise ValueError("evaluation.model and evaluation.output are the training's own; leave them out")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of "
                f"micro_batch_size={self.micro_batch_size}; change one of them"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {', '.join(names)}")
        if self.lora is not None and not any("lora" in stage.parts for stage in self.stages):
            raise ValueError("lora is set but no stage trains it; add the part lora or the preset valley-stage2-lora")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3: ZeRO 0 keeps everything on its device")
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError("precision fp16 needs use_gpu=true; take bf16 or fp32 on CPUs")
        return self

    def under(self, root: Path) -> Self:
        """The same run with absolute paths: relative outputs below `root`, inputs too unless they exist as given."""
        data = self.data
        if data.pipeline is not None:
            pipeline = dict(data.pipeline)
            # What is no path is left as it is: the pipeline's own configuration names it.
            for name in ("records", "media_root"):
                if isinstance(paths := pipeline.get(name), list | tuple):
                    pipeline[name] = [_input(root, one) if _is_path(one) else one for one in paths]
                elif _is_path(paths):
                    pipeline[name] = _input(root, paths)
            for name in ("windows_dir", "shards_dir"):
                if _is_path(folder := pipeline.get(name)):
                    pipeline[name] = _output(root, folder)
            data = data.model_copy(update={"pipeline": pipeline})
        if data.windows_dir is not None:
            data = data.model_copy(update={"windows_dir": _input(root, data.windows_dir)})
        return self.model_copy(
            update={
                "model": _input(root, self.model),
                "output": _output(root, self.output),
                "storage": self.storage if "://" in self.storage else str(_output(root, self.storage)),
                "data": data,
                "evaluation": self.evaluation and self.evaluation.under(root),
            }
        )


def _output(root: Path, path: str | Path) -> Path:
    return root / _expanded(path)


def _input(root: Path, path: str | Path) -> Path:
    given = _expanded(path)
    return given.absolute() if given.exists() else root / given


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user's home; write the path out") from error


def _is_path(value: object) -> TypeGuard[str | Path]:
    return isinstance(value, str | Path)
