"""What jobs/evaluate.py and jobs/answer.py work on where they are told nothing: generated clips, and a nano model."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from valley_ray.evaluate.check import check_model
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.nano.backbones import NanoConfig, make_backbones
from valley_ray.nano.make import WorldConfig, make_clips

WORLD = WorldConfig(num_train=1, num_train_harder=0, num_held_out=64, num_held_out_harder=16)
"""The first of the quickstart's held-out clips."""
MODEL, STAND_INS = "models/nano", ("models/nano-finetuned", "runs/nano/backbones")


SettingsT = TypeVar("SettingsT", bound=AnswerSettings)


def make_generated(settings: SettingsT, root: Path, *, say: Callable[[str], None]) -> SettingsT:
    """Make the clips below `root` where they are missing, and name a model that is there where the default is not.

    `say` gets a line for what takes time or differs from what was asked for. Raises CheckpointError for another model
    folder that is none, before anything is made.
    """
    if settings.model is not None and settings.model != root / MODEL:
        check_model(settings.model)
    make_clips(root / "runs/evaluate/clips", WORLD, say=say)
    if settings.model != root / MODEL or (root / MODEL / "config.json").is_file():
        return settings
    found = next((root / one for one in STAND_INS if (root / one / "config.json").is_file()), root / STAND_INS[-1])
    if not (found / "config.json").is_file():
        say(f"training the backbones in {found} (about a minute)")
        make_backbones(found, NanoConfig())
    say(f"{MODEL} is not there (make quickstart trains it): asking {found} instead")
    return settings.model_copy(update={"model": found})
