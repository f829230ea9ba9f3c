"""Files are looked up with few system calls, and found or missed just as without them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from valley_ray.data.sources import media
from valley_ray.data.sources.media import Media


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were looked at, one by one."""
    looked: list[str] = []
    real: Callable[..., os.stat_result] = os.stat

    def counted(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        looked.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", counted)
    return looked


def fill(root: Path) -> None:
    (root / "webvid/many").mkdir(parents=True)
    for number in range(20):
        (root / f"webvid/many/{number}.mp4").touch()


def find_all(root: Path) -> list[bool]:
    """Whether each of some names is there."""
    place = Media(str(root))
    names = [f"many/{number}" for number in range(25)] + [f"folder{number}/x.mp4" for number in range(25)]
    return [not place.clip("video", [name], {})["error"] for name in names]


def test_what_is_not_there_costs_no_look(tmp_path: Path, stats: list[str]) -> None:
    fill(tmp_path)
    stats.clear()
    assert find_all(tmp_path) == [True] * 20 + [False] * 30
    assert len(stats) == 20, "one for each file that is there, for its size and time"


@pytest.mark.parametrize(("listed", "kept"), [(0, 10), (5, 1000), (1000, 15)])
def test_large_and_many_folders_are_looked_into_just_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: int, kept: int
) -> None:
    fill(tmp_path)
    monkeypatch.setattr(media, "_LISTED_NAMES", listed)
    monkeypatch.setattr(media, "_KEPT_NAMES", kept)
    assert find_all(tmp_path) == [True] * 20 + [False] * 30


def test_memory_for_names_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_KEPT_NAMES", 100)
    place = Media(str(tmp_path))
    for number in range(1000):
        place.clip("video", [f"folder{number}/x.mp4"], {})
    assert len(place._local) <= 100 / media._FOLDER_COST
    assert place._num_kept <= 100


def test_records_on_one_video_look_at_it_once(tmp_path: Path, stats: list[str]) -> None:
    (tmp_path / "a.mp4").touch()
    place = Media(str(tmp_path))
    stats.clear()
    rows = [place.clip("video", ["a.mp4"], {}) for _ in range(100)]
    assert len({row["clip_id"] for row in rows}) == 1
    assert stats == [str(tmp_path / "a.mp4")]
