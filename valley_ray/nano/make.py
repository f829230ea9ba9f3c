"""The nano world on disk: what a nano training run reads. A folder becomes clips, record files and backbones.

Layout: ``data/train/*.mp4``, ``data/heldout/*.mp4``, ``data/train.json``, ``data/heldout.json``, ``backbones/``.
Knows no Ray: the caller may spread `write_clips` over a cluster.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import Field

from valley_ray.config import Config
from valley_ray.nano.backbones import CONFIG_FILE as BACKBONES_CONFIG
from valley_ray.nano.backbones import BackboneProgress, NanoConfig, make_backbones
from valley_ray.nano.clips import (
    Split,
    clip_name,
    question_records,
    training_records,
    write_records,
    write_scene,
)

TRAIN_SEED, HELD_OUT_SEED = 10_000, 20_000


class WorldConfig(Config):
    """How many clips there are of each kind."""

    num_train: int = Field(default=1400, ge=1)
    """Clips with one moving shape."""
    num_held_out: int = Field(default=256, ge=1)
    """The same, held out."""
    num_train_harder: int = Field(default=180, ge=0)
    """Clips of each harder kind (two shapes, one that turns, several to count)."""
    num_held_out_harder: int = Field(default=32, ge=0)
    """The same, held out."""
    shuffle_answers: bool = False
    """Answers in train.json belong to random other clips: nothing can be learned. For the proof of the numbers."""

    @property
    def train(self) -> Split:
        """The clips to learn from."""
        harder = self.num_train_harder
        return Split(
            "train",
            TRAIN_SEED,
            (("single", self.num_train), ("pair", harder), ("sequence", harder), ("count", harder)),
        )

    @property
    def held_out(self) -> Split:
        """The clips to be asked about."""
        harder = self.num_held_out_harder
        return Split(
            "heldout",
            HELD_OUT_SEED,
            (("single", self.num_held_out), ("pair", harder), ("sequence", harder), ("count", harder)),
        )


def write_record_files(data_root: Path, world: WorldConfig) -> None:
    """Write train.json (conversations) and heldout.json (one question each) into `data_root`, and make the folders."""
    for split in (world.train, world.held_out):
        (data_root / split.name).mkdir(parents=True, exist_ok=True)
    write_records(data_root / "train.json", training_records(world.train, shuffle_answers=world.shuffle_answers))
    write_records(data_root / "heldout.json", question_records(world.held_out))


def write_clips(data_root: Path, split: Split, stems: Iterable[str]) -> None:
    """Encode the clips of `split` named by `stems`."""
    for stem in stems:
        write_scene(data_root / clip_name(split, stem), split.scene(stem))


SMALL_WORLD = WorldConfig(num_train=96, num_held_out=32, num_train_harder=24, num_held_out_harder=8)
"""Clips enough to watch the data platform at work: 224 of them, made in seconds."""


def make_clips(data_root: Path, world: WorldConfig, *, say: Callable[[str], None]) -> None:
    """Make in one process the clips and their record files in `data_root`, if they are missing."""
    if (data_root / "train.json").is_file():
        return
    say(f"making clips in {data_root}")
    for split in (world.train, world.held_out):
        (data_root / split.name).mkdir(parents=True, exist_ok=True)
        write_clips(data_root, split, [stem for stem, _ in split.scenes()])
    write_record_files(data_root, world)


def make_world(root: Path, world: WorldConfig, nano: NanoConfig, *, say: Callable[[str], None]) -> None:
    """Make in one process whatever is missing of clips, records and backbones under `root`; `say` gets a line each."""
    make_clips(root / "data", world, say=say)
    make_missing_backbones(root / "backbones", nano, say=say)


def make_missing_backbones(folder: Path, nano: NanoConfig, *, say: Callable[[str], None]) -> None:
    """Make the backbones in `folder`, if there are none; `say` gets a line now and then."""
    if not (folder / "config.json").is_file():
        say(f"training the backbones in {folder} (about a minute)")
        make_backbones(folder, nano, on_progress=_line_every(200, say))


def take_over_clips(source: Path, target: Path, world: WorldConfig, *, say: Callable[[str], None]) -> None:
    """Link clips and records from folder `source` to `target`, if they are missing there and are those of `world`."""
    if (target / "train.json").is_file() or not _holds(source, world):
        return
    say(f"taking the clips of {source}")
    _copy_whole(source, target, _link)


def take_over_backbones(source: Path, target: Path, nano: NanoConfig, *, say: Callable[[str], None]) -> None:
    """Copy backbones from folder `source` to `target`, if they are missing there and were made with `nano`."""
    made_with = source / BACKBONES_CONFIG
    if (target / "config.json").is_file() or not made_with.is_file():
        return
    if json.loads(made_with.read_text(encoding="utf-8")) != nano.model_dump(mode="json"):
        return
    say(f"taking the backbones of {source}")
    _copy_whole(source, target, shutil.copy2)


def _copy_whole(source: Path, target: Path, copy: Callable[[str, str], object]) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shutil.copytree(source, draft, copy_function=copy)
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _holds(data_root: Path, world: WorldConfig) -> bool:
    """Whether the clips there are those of `world`, all of them."""
    if not (data_root / "train.json").is_file():
        return False
    records = json.loads((data_root / "train.json").read_text(encoding="utf-8"))
    if records != training_records(world.train, shuffle_answers=world.shuffle_answers):
        return False
    return all(
        (data_root / clip_name(split, stem)).is_file()
        for split in (world.train, world.held_out)
        for stem, _ in split.scenes()
    )


def _link(source: str, target: str) -> None:
    """A second name for the same bytes, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _line_every(num_steps: int, say: Callable[[str], None]) -> Callable[[BackboneProgress], None]:
    def on_progress(progress: BackboneProgress) -> None:
        if progress.step % num_steps == 0 or progress.step == progress.num_steps:
            say(f"{progress.name} step {progress.step}/{progress.num_steps}  loss {progress.loss:.3f}")

    return on_progress
