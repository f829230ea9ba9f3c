"""The two nano backbones, made at the same time, as one model folder that stage 1 can start from.

Tower and language model are trained in two processes with one thread each, since neither needs the other. Whatever
ends the process that asked for them ends these too. Knows no videos on disk and no Ray.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

from valley_ray.config import Config
from valley_ray.errors import TrainingError
from valley_ray.media.sampling import FrameSampling
from valley_ray.nano.language import LanguageConfig
from valley_ray.nano.tower import TowerConfig

POLL_S = 0.2
STOP_S = 5.0
TOWER_FILE = "tower.safetensors"
CONFIG_FILE = "nano_config.json"
"""What the backbones in a folder were made with."""


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

    The folder appears complete or not at all; one that is there is replaced. An exception, Ctrl-C among them, stops the
    two processes and removes what they wrote; drafts of a process that was killed are removed by the next call.

    Raises:
        TrainingError: one of the processes died.
    """
    _remove_abandoned(folder)
    draft = _draft_of(folder, os.getpid())
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    progress = context.Queue()
    jobs = [
        context.Process(target=_run, args=(make, draft, config, progress, os.getpid()), daemon=True)
        for make in (_make_language, _make_tower)
    ]
    try:
        for job in jobs:
            job.start()
        _follow(jobs, progress, on_progress or (lambda _: None))
        _put_in_tower(draft)
        (draft / CONFIG_FILE).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        _stop(jobs)
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _draft_of(folder: Path, pid: int) -> Path:
    return folder.with_name(f".{folder.name}.{pid}")


def _remove_abandoned(folder: Path) -> None:
    """Drafts whose process is no more."""
    for draft in folder.parent.glob(f".{folder.name}.*"):
        pid = draft.suffix.removeprefix(".")
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(draft, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _follow(jobs: Sequence[BaseProcess], progress: Any, on_progress: Callable[[BackboneProgress], None]) -> None:
    """Pass progress on until both jobs are done; raises TrainingError where one ended otherwise."""
    while True:
        all_done = all(job.exitcode is not None for job in jobs)
        with contextlib.suppress(Empty):
            while True:
                on_progress(progress.get(timeout=0 if all_done else POLL_S))
        for job in jobs:
            if job.exitcode:
                raise TrainingError(
                    f"a process that trains a nano backbone ended with status {job.exitcode}; its reason is above"
                )
        if all_done:
            return


def _stop(jobs: Sequence[BaseProcess]) -> None:
    started = [job for job in jobs if job.pid is not None]
    for job in started:
        job.terminate()
    for job in started:
        job.join(STOP_S)
        if job.exitcode is None:
            job.kill()
            job.join()


def _run(
    make: Callable[[Path, NanoConfig, Any], None], draft: Path, config: NanoConfig, progress: Any, parent: int
) -> None:
    """One of the two processes. Ctrl-C is the parent's to handle, and its death is this one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), name="watch-parent", daemon=True).start()
    make(draft, config, progress)


def _end_with(parent: int) -> None:
    """End this process once `parent` has ended without a word."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _reporter(name: str, progress: Any) -> Callable[[int, int, float], None]:
    """Puts every twentieth step into the queue."""

    def report(step: int, num_steps: int, loss: float) -> None:
        if step % 20 == 0 or step == num_steps:
            progress.put(BackboneProgress(name, step, num_steps, loss))

    return report


def _make_tower(folder: Path, config: NanoConfig, progress: Any) -> None:
    import torch
    from safetensors.torch import save_file

    from valley_ray.nano.tower import train_tower

    torch.set_num_threads(1)
    clip: Any = train_tower(config.tower, on_step=_reporter("tower", progress))
    weights = {name: weight.contiguous() for name, weight in clip.vision_model.state_dict().items()}
    save_file(weights, folder / TOWER_FILE)


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
