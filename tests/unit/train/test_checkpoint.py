"""Checkpoints that a run cannot go on from end it at once, with the reason."""

import json
from pathlib import Path

import pytest

from valley_ray.errors import ConfigError
from valley_ray.train.checkpoint import PROGRESS_FILE, read_progress
from valley_ray.train.sample_index import RunEndedError


def test_a_damaged_checkpoint_is_said_and_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(RunEndedError, match=r"is damaged .* take a new run_name"):
        read_progress(tmp_path)
    (tmp_path / PROGRESS_FILE).write_text('{"stage": 0, "sta')
    with pytest.raises(RunEndedError, match="is damaged"):
        read_progress(tmp_path)
    (tmp_path / PROGRESS_FILE).write_text(json.dumps({"stage": 0, "moment": 3}))
    with pytest.raises(ConfigError, match="another version of valley_ray"):
        read_progress(tmp_path)
