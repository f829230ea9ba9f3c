"""Many sources become one catalog: each clip once, ids distinct, all or nothing on disk, memory that does not grow."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from valley_ray.data.schema import FAILED, PENDING, check_clips, check_samples
from valley_ray.data.sources import (
    SourceConfig,
    catalog,
    mixing_order,
    read_catalog,
    read_summary,
    write_catalog,
)
from valley_ray.errors import DataError, StorageError

LARGEST_RSS_BYTES = 400 << 20


def turns(question: str = "<video>\nWhat moves?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A square."}]


def write(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def record(name: Any, video: str = "a.mp4") -> dict[str, Any]:
    return {"id": name, "video": video, "conversations": turns()}


def test_sources_share_clips_and_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"12345")
    first = write(tmp_path / "first.json", [record(1), {"id": 2}, record(3, "gone.mp4")])
    second = write(tmp_path / "second.json", [{"video": "a.mp4", "QA": [{"q": "Who?", "a": "He."}]}])
    sources = [SourceConfig(path=first), SourceConfig(path=second, weight=2), SourceConfig(path=tmp_path)]
    summary = write_catalog(sources, tmp_path / "out/catalog")
    clips, samples = read_catalog(tmp_path / "out/catalog")
    check_samples(samples, check_clips(clips))
    assert [Path(uri).name for uri in clips["uri"].to_pylist()] == ["a.mp4", "gone.mp4"]
    assert clips["size_bytes"].to_pylist() == [5, None]
    assert samples["sample_id"].to_pylist() == ["1", "2", "3", "second.json#0"]
    assert samples["source"].to_pylist() == ["first.json"] * 3 + ["second.json"]
    assert samples["status"].to_pylist() == [PENDING, FAILED, PENDING, PENDING]
    assert (summary.num_samples, summary.num_failed, summary.num_clips, summary.num_missing) == (4, 1, 2, 1)
    assert summary.by_error_class == {"invalid_conversation": 1}
    assert [(one.name, one.format, one.weight, one.num_samples, one.num_clips) for one in summary.sources] == [
        ("first.json", "llava", 1, 3, 2),
        ("second.json", "videochat", 2, 1, 0),
        (tmp_path.name, "folder", 1, 0, 0),
    ]
    assert read_summary(tmp_path / "out/catalog") == summary


def test_ids_that_repeat_are_made_distinct_and_stay_when_sources_are_added(tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", [record("a"), record("a"), record("a#2"), record("a"), {"id": "a"}])
    second = write(tmp_path / "2.json", [record("a"), record("b")])
    write_catalog([SourceConfig(path=first)], tmp_path / "one")
    summary = write_catalog([SourceConfig(path=first), SourceConfig(path=second)], tmp_path / "two")
    alone, both = (read_catalog(tmp_path / name)[1]["sample_id"].to_pylist() for name in ("one", "two"))
    assert alone == ["a", "a#2", "a#2#2", "a#3", "a#4"]
    assert both == [*alone, "a#5", "b"]
    assert summary.num_renamed == 5


def test_sources_of_one_name_are_told_apart_unless_they_are_named_so(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / "chat.json", [record(folder)]) for folder in "xyz"]
    write_catalog([SourceConfig(path=path) for path in paths], tmp_path / "out")
    assert read_catalog(tmp_path / "out")[1]["source"].to_pylist() == ["chat.json", "chat.json#2", "chat.json#3"]
    write_catalog([SourceConfig(path=path, name="all") for path in paths], tmp_path / "out")
    assert read_catalog(tmp_path / "out")[1]["source"].to_pylist() == ["all"] * 3


def test_damage_anywhere_leaves_what_was_there(tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", [record("good")])
    write_catalog([SourceConfig(path=good)], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    text = json.dumps([record(i) for i in range(9000)])
    (tmp_path / "bad.json").write_text(text[:-1] + ", nonsense]")
    with pytest.raises(DataError, match=f"bad.json are not valid JSON .*byte {len(text) + 1}"):
        write_catalog([SourceConfig(path=good), SourceConfig(path=tmp_path / "bad.json")], tmp_path / "out")
    with pytest.raises(DataError, match="no record to work on"):
        write_catalog([SourceConfig(path=write(tmp_path / "empty.json", []))], tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_shorter_catalog_replaces_a_longer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "BATCH_ROWS", 2)
    monkeypatch.setattr(catalog, "FILE_ROWS", 4)
    path = write(tmp_path / "r.json", [record(i, f"{i}.mp4") for i in range(11)])
    write_catalog([SourceConfig(path=path)], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("samples-*.parquet"))) == 3
    clips, samples = read_catalog(tmp_path / "out")
    assert samples["sample_id"].to_pylist() == [str(i) for i in range(11)]
    assert [Path(uri).name for uri in clips["uri"].to_pylist()] == [f"{i}.mp4" for i in range(11)]
    write_catalog([SourceConfig(path=write(path, [record("x")]))], tmp_path / "out")
    assert read_catalog(tmp_path / "out")[1]["sample_id"].to_pylist() == ["x"]


def test_what_is_no_catalog_and_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no catalog"):
        read_catalog(tmp_path)
    path = write(tmp_path / "r.json", [record("a")])
    with pytest.raises(StorageError, match="cannot write the catalog"):
        write_catalog([SourceConfig(path=path)], path / "below a file")
    with pytest.raises(DataError, match="no source"):
        write_catalog([], tmp_path / "out")
    write_catalog([SourceConfig(path=path)], tmp_path / "out")
    (tmp_path / "out/clips-00000.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is no table of clips"):
        read_catalog(tmp_path / "out")


def test_mixing_spreads_sources_by_size_and_weight() -> None:
    order = mixing_order([1, 1], [900, 100], seed=0)
    assert np.array_equal(np.sort(order), np.arange(1000))
    shares = [np.mean(order[:num] >= 900) for num in (100, 500, 1000)]
    assert shares == pytest.approx([0.1, 0.1, 0.1], abs=0.02)
    double = mixing_order([1, 2], [900, 100], seed=0)
    assert (double[:500] >= 900).sum() in (90, 91), "100 / (450 + 100) of the first 550"
    assert (double[550:] >= 900).sum() == 0, "twice as dense, used up when the other is at its half"
    assert np.array_equal(order, mixing_order([1, 1], [900, 100], seed=0))
    assert not np.array_equal(order, mixing_order([1, 1], [900, 100], seed=1))
    plain = mixing_order([1, 1], [3, 0], seed=None)
    assert plain.tolist() == [0, 1, 2]
    assert mixing_order([1], [0], seed=1).shape == mixing_order([], [], seed=1).shape == (0,)
    for weights in ([1], [1, 0], [1, float("inf")], [1, -1]):
        with pytest.raises(DataError, match="one weight above 0 per source"):
            mixing_order(weights, [1, 1], seed=0)


def write_webvid_like(path: Path, num_records: int) -> None:
    """About 300 bytes each, in the layout of the pretraining set, streamed to the disk."""

    def parts() -> Iterator[str]:
        for i in range(num_records):
            video = f"{i // 50 * 50 + 1:06d}_{i // 50 * 50 + 50:06d}/{10**9 + i}.mp4"
            words = f"in {i % 97} words if you can, please, and do not say what cannot be seen in it at all."
            question = turns(f"<video>\nDescribe the video concisely, {words}")
            row = {"id": f"{i:09d}", "video": video, "conversations": question}
            yield (", " if i else "") + json.dumps(row)

    with path.open("w") as file:
        file.write("[")
        file.writelines(parts())
        file.write("]")


def peak_rss(path: Path, directory: Path) -> tuple[int, int]:
    """(peak RSS in bytes, samples) of a process that writes the catalog of `path`."""
    program = (
        "import sys; from pathlib import Path; from valley_ray.data.sources import SourceConfig, write_catalog\n"
        "summary = write_catalog([SourceConfig(path=sys.argv[1])], Path(sys.argv[2]))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) << 10, summary.num_samples)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, num_samples = map(int, done.stdout.split())
    return peak, num_samples


def test_memory_grows_by_the_ids_alone(tmp_path: Path) -> None:
    peaks = []
    for num_records in (10_000, 50_000):
        write_webvid_like(tmp_path / "records.json", num_records)
        peak, num_samples = peak_rss(tmp_path / "records.json", tmp_path / "out")
        assert num_samples == num_records
        peaks.append(peak)
    per_record = (peaks[1] - peaks[0]) / 40_000
    # Two sets of digests take 2 * (45 + 32..64) bytes; measured 137.
    assert per_record < 300, f"{per_record:.0f} bytes per record, {peaks}"
    assert peaks[1] < LARGEST_RSS_BYTES // 2, peaks


@pytest.mark.slow
def test_seven_hundred_thousand_records_fit_in_400_megabytes(tmp_path: Path) -> None:
    write_webvid_like(tmp_path / "records.json", 700_000)
    peak, num_samples = peak_rss(tmp_path / "records.json", tmp_path / "out")
    assert num_samples == 700_000
    assert peak <= LARGEST_RSS_BYTES, f"{peak >> 20} MB"
