"""A run's folder on a disk and on other file systems; what a kill leaves in it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from valley_ray.errors import ConfigError
from valley_ray.train.run_folder import (
    SNAPSHOT_FILE,
    driven,
    keep_snapshot,
    record_attempt,
    remove_uncommitted,
    run_folder,
)


def test_a_path_and_its_file_url_are_the_same_folder(tmp_path: Path) -> None:
    by_path, by_url = run_folder(str(tmp_path), "run"), run_folder(f"file://{tmp_path}", "run")
    assert (by_path.url, by_path.local) == (by_url.url, by_url.local) == (str(tmp_path / "run"), tmp_path / "run")
    assert by_url.is_local


def test_small_files_travel_to_a_remote_folder_and_to_another_machine(tmp_path: Path) -> None:
    """The URL's file system is one of fsspec's, as that of a bucket is."""
    here = run_folder(f"local://{tmp_path}/bucket", "run", local=tmp_path / "here")
    assert not here.is_local
    record_attempt(here, after_step=0, workers=2)
    (here.local / "board").mkdir()
    (here.local / "board" / "events").write_bytes(b"\x00\x01")
    here.push()
    assert (tmp_path / "bucket" / "run" / "board" / "events").read_bytes() == b"\x00\x01"
    there = dataclasses.replace(here, local=tmp_path / "there")
    record_attempt(there, after_step=7, workers=1)
    there.push()
    lines = (tmp_path / "bucket" / "run" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["after_step"] for line in lines] == [0, 7]


def test_an_unknown_file_system_is_named_with_the_fix() -> None:
    with pytest.raises(ConfigError, match="storage='nosuch://bucket/runs' cannot be used") as caught:
        run_folder("nosuch://bucket/runs", "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("storage", ["memory://runs", "http://127.0.0.1/runs", "s3://"])
def test_a_place_that_cannot_keep_a_run_is_named(storage: str) -> None:
    with pytest.raises(ConfigError, match=f"storage='{storage}' cannot keep a run"):
        run_folder(storage, "run")


def test_a_cut_off_list_of_checkpoints_is_brought_back_and_half_uploads_go(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3", "models"):
        (folder.local / name).mkdir(parents=True)
        (folder.local / name / "file").write_text("x")
    snapshot = folder.local / SNAPSHOT_FILE
    snapshot.write_text(json.dumps({"checkpoint_results": ["checkpoint_1", "checkpoint_2"]}))
    keep_snapshot(folder)
    snapshot.write_text(snapshot.read_text()[:20])
    keep_snapshot(folder)
    remove_uncommitted(folder)
    assert json.loads(snapshot.read_text()) == {"checkpoint_results": ["checkpoint_1", "checkpoint_2"]}
    assert sorted(path.name for path in folder.local.iterdir() if path.is_dir()) == [
        "checkpoint_1",
        "checkpoint_2",
        "models",
    ]


def test_a_first_list_that_was_cut_off_means_a_run_from_the_start(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    (folder.local / "checkpoint_1").mkdir(parents=True)
    (folder.local / SNAPSHOT_FILE).write_text('{"checkpoint_results": [')
    remove_uncommitted(folder)
    assert list(folder.local.iterdir()) == []


def test_a_checkpoint_that_somebody_deleted_is_named(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    (folder.local / "checkpoint_2").mkdir(parents=True)
    listed = [{"checkpoint_dir_name": f"checkpoint_{number}"} for number in (1, 2)]
    (folder.local / SNAPSHOT_FILE).write_text(json.dumps({"checkpoint_results": listed}))
    with pytest.raises(ConfigError, match=r"its checkpoint_1 in .* is gone"):
        remove_uncommitted(folder)
    assert (folder.local / "checkpoint_2").is_dir()


def test_a_new_run_has_nothing_to_remove(tmp_path: Path) -> None:
    remove_uncommitted(run_folder(str(tmp_path / "nothing"), "run"))
    assert not (tmp_path / "nothing").exists()


def test_a_run_is_driven_by_one_process(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    said = f"run_name=run is being trained already .* by process {os.getpid()} of"
    with driven(folder), pytest.raises(ConfigError, match=said), driven(run_folder(str(tmp_path), "run")):
        pass
    with driven(folder):
        pass
