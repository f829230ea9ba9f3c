"""What a user writes for answering a data set and for evaluating a model on it. Knows no Ray and no torch."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from valley_ray.config import Config
from valley_ray.data.config import DecodeSettings
from valley_ray.data.sources.config import SourceConfig
from valley_ray.engine.open import EngineKind

MetricName = Literal["exact_match", "qa_accuracy", "bleu", "rouge"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class AnswerSettings(DecodeSettings):
    """Sources of questions about clips → answers, a row each. Clips that a run has decoded are not decoded again."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Record files, benchmarks, or folders of media (which need `question`), one after the other."""
    media_root: str | None = Field(default=None, min_length=1)
    """Folder that media names are relative to, for sources that name none of their own."""
    question: str | None = Field(default=None, min_length=1)
    """Asked about every clip that no record of the sources asks about; None: such clips are left out."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation of several turns are asked for, each after the turns before it as recorded."""
    max_samples: int | None = Field(default=None, ge=1)
    """Samples that are asked about, drawn by `seed`, then clips that nobody asks about; None: all of them."""
    seed: int = Field(default=0, ge=0)
    """Draws the samples, the rows that the page shows, and random answers where `temperature` is above 0."""
    model: Path | None = None
    """Model folder that answers. While training: leave it out, it is the model that is trained."""
    output: Path | None = None
    """Folder that is written, or gone on with. While training: leave it out, it is the folder of the run."""
    shards_dir: Path | None = None
    """Folder of decoded clips, that of a prepared data set too (its `shards`): clips that are there are not decoded
    again. None: `shards` in output."""
    block_size: int = Field(default=64, ge=1)
    """Questions per task: their clips are one shard, and a node that dies costs at most the answers under way."""
    retry_failed: bool = False
    """Decode clips and ask questions again that failed in an earlier run: after a net was down, or with more memory."""

    max_tokens: int = Field(default=128, ge=1)
    """Longest answer; shorter where the model's context ends."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: the likeliest token always, which is what `Assistant.ask` does."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of probability that tokens are drawn from, where temperature is above 0."""
    precision: Precision = "auto"
    """Numbers of the model; auto: float32 on a CPU, the folder's own on a GPU."""
    engine: EngineKind = "slots"
    """What makes the tokens: slots, or vllm where it is installed, an extra for GPUs."""
    num_slots: int = Field(default=16, ge=1)
    """Questions that one actor answers at once."""
    num_actors: int | None = Field(default=None, ge=1)
    """Actors that hold the model; None: one per GPU, or per two CPUs where `actor_gpus` is 0."""
    actor_cpus: float = Field(default=1, gt=0)
    """CPUs that each of them reserves."""
    actor_gpus: float = Field(default=0, ge=0)
    """GPUs that each of them reserves; 0: the model runs on the CPU."""

    @model_validator(mode="after")
    def _check_draw(self) -> Self:
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p={self.top_p} counts where temperature is above 0; set temperature or drop top_p")
        return self

    def under(self, root: Path) -> Self:
        """The same with absolute paths: a relative output below `root`, inputs too unless they exist as given."""
        sources = []
        for source in self.sources:
            paths = {"path": source.path, "media_root": source.media_root or self.media_root}
            paths["companion"] = source.companion
            sources.append(
                source.model_copy(update={name: path and _input(root, path) for name, path in paths.items()})
            )
        update: dict[str, object] = {"sources": tuple(sources), "media_root": None}
        if self.model is not None:
            update["model"] = Path(_input(root, os.fspath(self.model)))
        if isinstance(encoder := getattr(self, "bertscore_model", None), Path):
            update["bertscore_model"] = Path(_input(root, os.fspath(encoder)))
        for name in ("output", "shards_dir"):
            if (folder := getattr(self, name)) is not None:
                update[name] = root / Path(folder).expanduser()
        return self.model_copy(update=update)


class JudgeConfig(Config):
    """A language model behind an OpenAI-compatible URL that says how well an answer meets the reference."""

    url: str = Field(pattern=r"^https?://")
    """Base URL, up to and with `/v1`."""
    model: str = Field(min_length=1)
    """Name of the model there."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; no key is sent where it is not set."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at once."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one reply."""
    retries: int = Field(default=4, ge=0)
    """How often a request is sent again after a busy server, a broken connection or a reply without a verdict."""


class EvaluationConfig(AnswerSettings):
    """A held-out split, and how answers to it are measured: alone (`jobs/evaluate.py`) or while training."""

    metrics: tuple[MetricName, ...] = ("exact_match", "qa_accuracy", "bleu", "rouge")
    """What is computed of every answer; see valley_ray/evaluate/metrics.py."""
    bertscore_model: Path | None = None
    """Folder of an encoder (BERT, RoBERTa, ...) for BERTScore; None leaves it out."""
    bertscore_layer: int | None = Field(default=None, ge=1)
    """Layer of that encoder; None: the one that BERTScore's authors found best for its kind, else the last."""
    judge: JudgeConfig | None = None
    """Model that judges answers; None leaves it out. It is asked about each answer once, across resumed runs."""
    every_checkpoints: int = Field(default=1, ge=1)
    """While training: every which checkpoint is evaluated."""
    timeout_s: float | None = Field(default=None, gt=0)
    """While training: longest evaluation of one checkpoint; a longer one is given up. None: no limit."""
    best: str = "exact_match"
    """While training: metric whose largest value makes the best checkpoint."""

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.best not in (known := self.metric_names):
            raise ValueError(f"best={self.best!r} is none of the metrics, {', '.join(known)}")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the numbers that an evaluation gives, as far as they can be computed."""
        names = [f"rouge_{of}" for of in "12l"] if "rouge" in self.metrics else []
        names += [name for name in self.metrics if name != "rouge"]
        names += ["bertscore"] if self.bertscore_model is not None else []
        names += ["judge_score", "judge_accuracy"] if self.judge is not None else []
        return (*names, "answered")

    @property
    def resources(self) -> dict[str, float]:
        """What an evaluation in one process reserves, as `ray.remote` takes it."""
        return {"num_cpus": self.actor_cpus, "num_gpus": self.actor_gpus}


def _input(root: Path, locator: str) -> str:
    if "://" in locator:
        return locator
    path = Path(locator).expanduser()
    return str(path.absolute() if path.exists() else root / path)
