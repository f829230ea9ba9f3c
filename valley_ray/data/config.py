"""What a user writes for the data pipeline. Knows no Ray, so that it is checked before any starts."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from valley_ray.config import Config
from valley_ray.data.feature_store import Dtype, Form
from valley_ray.data.sources.config import SourceConfig, distinct_name
from valley_ray.fetch import FetchPolicy
from valley_ray.media.decode import Backend
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import SandboxLimits


class DecodeSettings(Config):
    """How clips are decoded, whoever asks for them."""

    sampling: FrameSampling | None = None
    """Frames taken from a video; None: as the processor says."""
    block_size: int = Field(default=64, ge=1)
    """Clips per task and per shard; what a crash of a worker makes necessary to decode again."""
    decode_cpus: float = Field(default=0.5, gt=0)
    """CPUs that a decoding task reserves. Fractions, since beside training whole ones would starve each other."""
    max_decode_tasks: int | None = Field(default=None, ge=1)
    """Decoding tasks at once; None: as many as fit, on a cluster of one node at most one per CPU."""
    task_retries: int = Field(default=3, ge=0)
    """How often a block is begun again after its worker or node died between two clips, before the pipeline fails. A
    death in the middle of a clip is one of that clip's two attempts instead."""
    video_decoder: Backend = "pyav"
    """Reader of videos: pyav, or decord for upstream's pixels with its faults (cut clips, HEVC, 10 bits)."""
    sandbox: SandboxLimits = SandboxLimits()
    """Time and memory for decoding one clip."""
    fetch: FetchPolicy = FetchPolicy()
    """What may be fetched for media named by a URL; local files are not limited by it."""


class PipelineConfig(DecodeSettings):
    """What is read, how it is cut and where it goes."""

    records: tuple[Path, ...] = Field(min_length=1)
    """Record files (LLaVA / Valley JSON lists), one after the other."""
    media_root: tuple[Path, ...] = Field(min_length=1)
    """Folder that the media names of the records are relative to, or a list with one for each file of `records`; see
    `valley_ray.data.sources.places`."""
    model: Path
    """Model folder whose processor tokenizes and crops."""
    windows_dir: Path
    """Store of the windows: on a file system that all nodes and the trainers share."""
    shards_dir: Path | None = None
    """Folder of the decoded clips, which other stores may share: clips that are there are not decoded again. None:
    windows_dir."""
    seed: int | None = Field(default=None, ge=0)
    """Shuffles the samples where `run_pipeline` is given no order; None: the order of the files."""
    window_size: int = Field(default=256, ge=1)
    """Samples per window. Trainers start after the first one."""

    @field_validator("media_root", mode="before")
    @classmethod
    def _one_root(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.media_root) not in (1, len(self.records)):
            raise ValueError(
                f"media_root lists {len(self.media_root)} folders for {len(self.records)} files of records; give one "
                "folder for all, or one for each"
            )
        return self

    @property
    def roots(self) -> tuple[Path, ...]:
        """The media root of each file of records."""
        return self.media_root if len(self.media_root) > 1 else self.media_root * len(self.records)

    @property
    def source_names(self) -> tuple[str, ...]:
        """What samples of each file of records carry as their source: its name, or `NAME#2` where that is taken."""
        names: list[str] = []
        for path in self.records:
            names.append(distinct_name(path.name, names))
        return tuple(names)


class PrepareConfig(DecodeSettings):
    """Sources of clips and samples → a folder of shards, tables and windows."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Record files and folders of media, one after the other."""
    media_root: str | None = Field(default=None, min_length=1)
    """Folder that media names are relative to, for sources that name none of their own."""
    output: Path
    """Folder that is written, or added to: what it holds of the same clips is not decoded again. On a file system that
    all nodes share."""
    model: Path | None = None
    """Model folder whose processor crops and tokenizes; None: no windows, only decoded clips."""
    video_crop: Crop | None = None
    """Cut of video frames where there is no model; None: short side 256, centre 224 (upstream)."""
    image_crop: Crop | None = None
    """Cut of images where there is no model; None: CLIP's, 224."""
    seed: int | None = Field(default=None, ge=0)
    """Shuffles the samples in each source; None: the order of the files. Sources are mixed by their weights."""
    window_size: int = Field(default=256, ge=1)
    """Samples per window."""
    compact: bool = False
    """Merge small shards into ones of 256 MB to 1 GB at the end; readers of the small ones are not disturbed."""
    retry_failed: bool = False
    """Decode clips again that an earlier run could not decode: after a net was down, or with more time or memory."""

    features: Form | Literal["off"] = "off"
    """Run the model's tower over all clips once and keep its features beside the shards: no training over them does so
    again. pooled: means over time, less than the frames, for mean pooling alone; full: for every pooling, more."""
    features_dtype: Dtype = "float16"
    """Numbers of features: float16 for half the bytes, float32 where training shall not differ by a bit."""
    feature_batch_frames: int = Field(default=32, ge=1)
    """Frames in one pass of the tower."""
    feature_actors: int | None = Field(default=None, ge=1)
    """Actors that hold the tower; None: as many as fit."""
    feature_cpus: float = Field(default=1, gt=0)
    """CPUs that each of them reserves."""
    feature_gpus: float = Field(default=0, ge=0)
    """GPUs that each of them reserves; 0: the tower runs on the CPU."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.features != "off" and self.model is None:
            raise ValueError(f"features={self.features} needs model, the folder whose tower makes them")
        if self.model is not None and (self.video_crop is not None or self.image_crop is not None):
            raise ValueError("video_crop and image_crop are the model's own where there is a model; set them to null")
        return self

    def under(self, root: Path) -> Self:
        """The same with absolute paths: a relative output below `root`, inputs too unless they exist as given."""
        sources = []
        for source in self.sources:
            media_root = source.media_root or self.media_root
            paths = {"path": source.path, "media_root": media_root, "companion": source.companion}
            update = {name: path and _input(root, path) for name, path in paths.items()}
            sources.append(source.model_copy(update=update))
        model = Path(_input(root, str(self.model))) if self.model is not None else None
        return self.model_copy(
            update={"sources": tuple(sources), "media_root": None, "output": root / self.output, "model": model}
        )


def _input(root: Path, locator: str) -> str:
    if "://" in locator:
        return locator
    path = Path(locator).expanduser()
    return os.path.abspath(path if path.exists() else root / path)
