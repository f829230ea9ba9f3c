"""What a video costs in CPU time beside the reference chain: decord, PIL and numpy, written plainly.

Both turn a file into eight normalised frames of 224 x 224, float32 [8, 3, 224, 224], in one thread; they take turns.
Knows no Ray. T frames, H height, W width, C = 3 colours (RGB).
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from valley_ray.benchmarks.long_clips import write_long_clip
from valley_ray.config import Config
from valley_ray.media import decode
from valley_ray.media.preprocess import Crop, normalize
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox
from valley_ray.storage import storage_root

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's colours, as in upstream's load_video (valley/util/data_util.py)."""

Chain = Callable[[Path], npt.NDArray[np.float32]]


class DecodeCost(Config):
    """What is timed."""

    videos: Path = Field(default_factory=lambda: Path(os.environ.get("VALLEY_VIDEOS", "../shared/videos")))
    """Folder of real videos; those that its manifest.json (if any) calls ok."""
    clips: Path = Path("runs/benchmark_data")
    """Where the generated clips are kept for the next time."""
    num_clips: int = Field(default=2, ge=1)
    """Generated clips of each kind."""
    clip_s: float = Field(default=60.0, ge=1)
    """Length of a generated clip, seconds."""
    num_rounds: int = Field(default=5, ge=1)
    """Rounds over the generated clips; medians over them are reported."""
    num_rounds_real: int = Field(default=15, ge=1)
    """Rounds over the real videos, which take a tenth of a second: more to outweigh what else the machine does."""


@dataclass(frozen=True)
class FileCost:
    """Medians of one file; those of the reference are None where it cannot read the file."""

    name: str
    our_cpu_ms: float
    our_wall_ms: float
    reference_cpu_ms: float | None
    reference_wall_ms: float | None


def decode_numbers(config: DecodeCost, *, say: Callable[[str], None]) -> dict[str, object]:
    """What benchmark_data reports of the decoder alone: `cpu_ratio_*` (None for an absent set), peak, medians."""
    with_b, without_b = (long_videos(config, num_bframes=number) for number in (3, 0))
    sets = {"real": real_videos(config.videos), "long_gop": with_b, "long_gop_no_b": without_b}
    ratios: dict[str, object] = {}
    medians = {}
    say(f"{'CPU ms per video':<36}{'reference':>10}{'ours':>10}{'ratio':>8}")
    for name, paths in sets.items():
        costs = []
        num_rounds = config.num_rounds_real if name == "real" else config.num_rounds
        for cost in measure(paths, num_rounds=num_rounds, must_equal=name != "real"):
            costs.append(cost)
            theirs, ratio = (f"{x:.2f}" if x else "-" for x in (cost.reference_cpu_ms, cpu_ratio([cost])))
            say(f"{cost.name:<36}{theirs:>10}{cost.our_cpu_ms:>10.2f}{ratio:>8}")
        ratios[f"cpu_ratio_{name}"] = cpu_ratio(costs)
        medians[name] = [asdict(cost) for cost in costs]
    return {**ratios, "child_peak_mb": child_peak_mb(with_b + without_b), "medians": medians}


def our_chain(path: Path) -> npt.NDArray[np.float32]:
    """float32 [T, 3, S, S]: this house's way."""
    return normalize(decode.frames(path, FrameSampling(), crop=Crop()).frames_THWC, mean=MEAN, std=STD)


def reference_chain(path: Path) -> npt.NDArray[np.float32]:
    """float32 [T, 3, S, S]: what upstream's load_video does, without its detours over tensors."""
    import decord

    reader = decord.VideoReader(os.fspath(path), num_threads=1)
    crops = []
    for frame_HWC in reader.get_batch(np.linspace(0, len(reader) - 1, 8).astype(int)).asnumpy():
        height, width = frame_HWC.shape[:2]
        new_wh = (256, int(256 * height / width)) if width < height else (int(256 * width / height), 256)
        resized = Image.fromarray(frame_HWC).resize(new_wh, Image.Resampling.BILINEAR)
        left, top = round((new_wh[0] - 224) / 2), round((new_wh[1] - 224) / 2)
        crops.append(np.asarray(resized.crop((left, top, left + 224, top + 224))))
    pixels_THWC: npt.NDArray[np.float32] = np.stack(crops).astype(np.float32) / np.float32(255)
    normal_THWC = (pixels_THWC - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return np.ascontiguousarray(normal_THWC.transpose(0, 3, 1, 2))


def real_videos(folder: Path) -> list[Path]:
    """The files to time; none where the folder is absent."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        return [folder / name for name, entry in entries.items() if entry["status"] == "ok"]
    return sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []


def long_videos(config: DecodeCost, *, num_bframes: int) -> list[Path]:
    """The generated clips of one kind, encoded where they are missing (about 30 s of CPU each)."""
    folder = storage_root() / config.clips
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(config.num_clips):
        seed = 100 * num_bframes + number
        path = folder / f"{config.clip_s:g}s-{num_bframes}b-{seed}.mp4"
        if not path.is_file():
            write_long_clip(path, seed=seed, num_bframes=num_bframes, seconds=config.clip_s)
        paths.append(path)
    return paths


def measure(paths: Sequence[Path], *, num_rounds: int, must_equal: bool) -> Iterator[FileCost]:
    """One cost per file, in order.

    Args:
        must_equal: whether both chains have to give the same pixels. Decord shows other frames of some real files
            (edit lists, two streams, rotation), never of the generated ones.

    Raises:
        AssertionError: the pixels differ: then there is nothing to compare.
        MediaError: a file that this house cannot read.
    """
    for path in paths:
        ours, theirs = our_chain(path), _reference_or_none(path)
        if must_equal:
            assert theirs is not None, f"the reference cannot read {path.name}"
            assert np.array_equal(ours, theirs), f"other pixels than the reference's in {path.name}"
        chains = [our_chain] if theirs is None else [reference_chain, our_chain]
        rounds = [[_timed(chain, path) for chain in chains] for _ in range(num_rounds)]
        cpu, wall = (
            [median(times) for times in zip(*(_column(row, i) for row in rounds), strict=True)] for i in (0, 1)
        )
        reference = (None, None) if theirs is None else (cpu[0], wall[0])
        yield FileCost(path.name, cpu[-1], wall[-1], *reference)


def cpu_ratio(costs: Sequence[FileCost]) -> float | None:
    """CPU time per video of the reference over ours, over the files that both read; None without any."""
    both = [(cost.reference_cpu_ms, cost.our_cpu_ms) for cost in costs if cost.reference_cpu_ms is not None]
    return sum(theirs for theirs, _ in both) / sum(ours for _, ours in both) if both else None


def child_peak_mb(paths: Sequence[Path]) -> float | None:
    """Most memory (VmHWM, 10^6 bytes) that a decoding child held over these files; None without procfs."""
    with Sandbox() as sandbox:
        for path in paths:
            sandbox.frames(path, FrameSampling(), crop=Crop())
        status = Path(f"/proc/{sandbox.child_pid}/status")
        if not status.is_file():
            return None
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def _reference_or_none(path: Path) -> npt.NDArray[np.float32] | None:
    import decord

    try:
        return reference_chain(path)
    except (decord.DECORDError, RuntimeError):
        return None


def _timed(chain: Chain, path: Path) -> tuple[float, float]:
    """(CPU, wall), milliseconds; CPU of the whole process, so that decord's own thread counts."""
    wall, cpu = time.perf_counter(), time.process_time()
    chain(path)
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def _column(row: Sequence[tuple[float, float]], place: int) -> list[float]:
    return [times[place] for times in row]
