"""The two nano backbones, made at the same time, as one model folder that stage 1 can start from.

Tower and language model are trained in two processes with one thread each, since neither needs the other. Knows no
videos on disk and no Ray.
"""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from valley_ray.config import Config
from valley_ray.media.sampling import FrameSampling
from valley_ray.nano.language import LanguageConfig
from valley_ray.nano.tower import TowerConfig

POLL_S = 0.2
TOWER_FILE = "tower.safetensors"


class NanoConfig(Config):
    """Sizes and lessons of the two backbones."""

    tower: TowerConfig = TowerConfig()
    """Vision tower."""
    language: LanguageConfig = LanguageConfig()
    """Language model."""


@dataclass(frozen=True)
class BackboneProgress:
    """How far one backbone is."""

    name: str
    """"tower" or "language"."""
    step: int
    num_steps: int
    loss: float


def make_backbones(
    folder: Path, config: NanoConfig, *, on_progress: Callable[[BackboneProgress], None] | None = None
) -> Path:
    """Train both backbones and write them, with a random projector, as a model folder; returns `folder`.

    The folder appears complete or not at all; one that is there is replaced.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        progress = manager.Queue()
        jobs = [
            pool.submit(_make_language, draft, config, progress),
            pool.submit(_make_tower, draft / TOWER_FILE, config.tower, progress),
        ]
        _follow(jobs, progress, on_progress or (lambda _: None))
    _put_in_tower(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
    return folder


def _follow(jobs: list[Future[None]], progress: Any, on_progress: Callable[[BackboneProgress], None]) -> None:
    """Pass progress on until both jobs are done; raises what a job raised."""
    while True:
        all_done = all(job.done() for job in jobs)
        try:
            while True:
                on_progress(progress.get(timeout=0 if all_done else POLL_S))
        except Empty:
            pass
        for job in jobs:
            if job.done():
                job.result()
        if all_done:
            return


def _reporter(name: str, progress: Any) -> Callable[[int, int, float], None]:
    """Puts every twentieth step into the queue."""

    def report(step: int, num_steps: int, loss: float) -> None:
        if step % 20 == 0 or step == num_steps:
            progress.put(BackboneProgress(name, step, num_steps, loss))

    return report


def _make_tower(path: Path, config: TowerConfig, progress: Any) -> None:
    import torch
    from safetensors.torch import save_file

    from valley_ray.nano.tower import train_tower

    torch.set_num_threads(1)
    clip: Any = train_tower(config, on_step=_reporter("tower", progress))
    save_file({name: weight.contiguous() for name, weight in clip.vision_model.state_dict().items()}, path)


def _make_language(folder: Path, config: NanoConfig, progress: Any) -> None:
    """Write the model folder with the trained language model and a tower that is still random."""
    import torch

    from valley_ray.model.valley import ValleyForConditionalGeneration
    from valley_ray.nano.language import MAX_LENGTH, SYSTEM_PROMPT, make_tokenizer, new_language_model, teach_reading
    from valley_ray.nano.tower import CROP, IMAGE_MEAN, IMAGE_STD, new_clip
    from valley_ray.processor import ProcessorConfig, ValleyProcessor

    torch.set_num_threads(1)
    torch.manual_seed(config.language.seed)
    tokenizer = make_tokenizer()
    model = ValleyForConditionalGeneration.from_backbones(
        new_clip(config.tower), new_language_model(config.language, tokenizer), tokenizer
    )
    processor = ValleyProcessor(
        tokenizer,
        ProcessorConfig(
            num_patches=model.config.num_patches,
            sampling=FrameSampling(num_frames=8),
            video_crop=CROP,
            image_crop=CROP,
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
            system_prompt=SYSTEM_PROMPT,
            max_length=MAX_LENGTH,
        ),
    )
    teach_reading(model, processor, config.language, on_step=_reporter("language", progress))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _put_in_tower(folder: Path) -> None:
    """Replace the random tower of the model in `folder` by the trained one beside it."""
    from safetensors.torch import load_file

    from valley_ray.model.valley import ValleyForConditionalGeneration

    model = ValleyForConditionalGeneration.from_pretrained(folder)
    model.vision_tower.load_state_dict(load_file(folder / TOWER_FILE))
    model.save_pretrained(folder)
    (folder / TOWER_FILE).unlink()
