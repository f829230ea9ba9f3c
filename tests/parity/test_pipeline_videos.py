"""The outside video set, and the records of the original's items, through the whole data platform: jobs/prepare.py.

What is shown of every file equals the manifest, as in test_videos.py, after Ray, the sandbox, a shard and the ledger.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity_set import ROOT as PARITY
from parity_set import load_json
from test_dataset import MEAN_TOLERANCE
from test_videos import ROOT as VIDEOS
from test_videos import load_manifest, problems_of

from valley_ray.data.frame_store import FrameStore, map_table
from valley_ray.data.prepare import read_tables
from valley_ray.data.schema import CLIPS_SCHEMA, OK, SAMPLES_SCHEMA
from valley_ray.media import decode
from valley_ray.media.frames import VideoFrames
from valley_ray.media.preprocess import Crop, normalize, resize_and_crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.processor import ProcessorConfig

pytestmark = pytest.mark.ray

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


def prepare(output, *arguments, folder=None):
    """The job as a user starts it; returns its summary and the rows of its ledger by the file's name."""
    command = [sys.executable, str(JOB), "--output", str(output), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["rows_in"] == summary["ok"] + summary["failed"]
    assert summary["repeated_rows"] == 0
    assert str(output / "report.html") in done.stdout
    return summary, read_tables(output / "clips", CLIPS_SCHEMA).to_pylist()


def shown(row, output, store):
    """Frames of one ledger row with their times, as a trainer and the shard have them."""
    times = map_table(output / "shards" / row["shard"])["pts_seconds"][row["row"]].as_py()
    return VideoFrames(store.frames(row["shard"], row["row"]), np.array(times))


def test_every_file_of_the_set_has_its_frames_in_a_shard(tmp_path):
    """The manifest tells about whole frames: those of a direct decode are held to it, and then cut like the shard's."""
    manifest, problems = load_manifest(), []
    crop = Crop(size=96, short_side=112)
    for number in sorted({len(want.get("fixed8_indices", range(8))) for want in manifest.values()}):
        names = [name for name, want in manifest.items() if len(want.get("fixed8_indices", range(8))) == number]
        inputs = [word for name in names for word in ("--input", str(VIDEOS / name))]
        output = tmp_path / str(number)
        cut = f"video_crop={json.dumps({'size': crop.size, 'short_side': crop.short_side})}"
        summary, rows = prepare(
            output, *inputs, cut, f"image_crop={cut.partition('=')[2]}", f"sampling.num_frames={number}"
        )
        assert summary["rows_in"] == len(names)
        by_name, store = {Path(row["uri"]).name: row for row in rows}, FrameStore(output / "shards")
        for name in names:
            want, row = manifest[name], by_name[name]
            if (row["status"] == OK) != (want["status"] == "ok"):
                problems.append(f"{name}: {row['status']} {row['error']}, the manifest has {want['status']}")
            if OK not in (row["status"], want["status"]) or problems:
                continue
            whole, came = decode.frames(VIDEOS / name, FrameSampling(num_frames=number)), shown(row, output, store)
            problems += problems_of(name, want, VideoFrames(whole.frames_THWC, came.pts_seconds))
            if not np.array_equal(came.frames_THWC, resize_and_crop(whole.frames_THWC, crop)):
                problems.append(f"{name}: other pictures in the shard")
            if (row["width"], row["height"]) != (want["display_width"], want["display_height"]):
                problems.append(f"{name}: the ledger says {row['width']} x {row['height']}")
    assert problems == []


def test_the_originals_records_become_samples_with_its_pixels(tmp_path):
    """Items that the original opens are ok, with the mean of its pixels; those it cannot open are failed rows."""
    items = [item for item in load_json("dataset.json")["items"] if not item["config_override"]]
    records = [item["record"] | {"id": f"{number}"} for number, item in enumerate(items)]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    output = tmp_path / "out"
    arguments = ["--input", str(tmp_path / "records.json"), f"media_root={PARITY / 'media'}"]
    summary, rows = prepare(output, *arguments, folder=PARITY)
    assert summary["samples_in"] == len(items)
    assert summary["rows_in"] <= len(items), "a clip that several records show is one row"
    clips, store = {row["clip_id"]: row for row in rows}, FrameStore(output / "shards")
    samples = {row["sample_id"]: row for row in read_tables(output / "samples", SAMPLES_SCHEMA).to_pylist()}
    config, problems = ProcessorConfig(num_patches=1), []
    for record, item in zip(records, items, strict=True):
        sample = samples[record["id"]]
        is_recorded = isinstance(item["result"], dict)
        if (sample["status"] == OK) != is_recorded:
            problems.append(
                f"{record['id']}: {sample['status']} {sample['error']}, the original: {item['result']!r:.80}"
            )
        elif is_recorded and sample["clip_ids"] and item["result"].get("image_mean") is not None:
            [clip] = [clips[clip_id] for clip_id in sample["clip_ids"]]
            frames = store.frames(clip["shard"], clip["row"])
            mean = normalize(frames, mean=config.image_mean, std=config.image_std).mean()
            if abs(mean - item["result"]["image_mean"]) > MEAN_TOLERANCE:
                problems.append(f"{record['id']}: mean {mean}, the original's is {item['result']['image_mean']}")
    assert problems == []
