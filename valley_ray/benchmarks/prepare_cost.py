"""What preparing many videos on Ray costs beside a plain loop of the same decoder, and beside a pool of two processes.

All three decode the same files with the same decoder. The loop and the pool throw the frames away; ours keeps every
promise it makes: a decoding child that may crash, shards, tables and the report on disk. The three take turns; Ray and
the pool are started, and both have decoded a few videos, before the clock runs.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.pool
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import ray
from pydantic import Field

from valley_ray.benchmarks.decode_cost import DecodeCost, decode_numbers, real_videos
from valley_ray.benchmarks.long_clips import write_long_clip
from valley_ray.benchmarks.process_cost import TreeWatch
from valley_ray.data.config import PipelineConfig, PrepareConfig
from valley_ray.data.pipeline import run_pipeline
from valley_ray.data.prepare import prepare
from valley_ray.data.shards import Sample, WindowStore
from valley_ray.data.sources.config import SourceConfig
from valley_ray.media import decode
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.session import quiet_ray_data
from valley_ray.storage import storage_root

NUM_CPUS = 2
NUM_WARM = 16
"""Videos that Ray and the pool decode before the clock runs."""
NUM_STAND_INS, STAND_IN_S = 8, 5.0
"""Generated clips where there are no real ones, and their length in seconds."""
NUM_SECOND_EPOCH = 48
"""Videos that two plans share."""


class PrepareCost(DecodeCost):
    """What is timed, the decoder alone and the platform around it."""

    num_videos: int = Field(default=408, ge=2 * NUM_WARM)
    """Files that are prepared: the real videos under so many names."""
    num_rounds_prepare: int = Field(default=3, ge=1)
    """Rounds over them; medians are reported."""


@dataclass(frozen=True)
class Round:
    """Seconds that one round took."""

    loop_cpu_s: float
    pool_wall_s: float
    ray_wall_s: float
    driver_cpu_s: float
    worker_cpu_s: float
    decoder_cpu_s: float
    server_cpu_s: float
    """Ray's own servers, which also run when nothing is to be done."""

    @property
    def our_cpu_s(self) -> float:
        """What preparing took, Ray's own servers aside."""
        return self.driver_cpu_s + self.worker_cpu_s + self.decoder_cpu_s


def data_numbers(config: PrepareCost, say: Callable[[str], None]) -> dict[str, object]:
    """What jobs/benchmark_data.py reports: the decoder alone, then the platform."""
    return decode_numbers(config, say=say) | prepare_numbers(config, say=say)


def prepare_numbers(config: PrepareCost, *, say: Callable[[str], None]) -> dict[str, object]:
    """What benchmark_data reports of the platform, on a Ray of its own: `ray_*`, `second_epoch_decodes`, medians."""
    folder = storage_root() / config.clips
    videos = many_videos(config, folder / "many")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    quiet_ray_data()
    try:
        rounds = _rounds(config, videos, work, say)
        num_decodes = second_epoch_decodes(videos[:NUM_SECOND_EPOCH], work / "epochs")
    finally:
        ray.shutdown()
        shutil.rmtree(work, ignore_errors=True)
    return {
        "ray_cpu_efficiency": median(one.loop_cpu_s / one.our_cpu_s for one in rounds),
        "ray_cpu_efficiency_with_servers": median(
            one.loop_cpu_s / (one.our_cpu_s + one.server_cpu_s) for one in rounds
        ),
        "ray_wall_vs_pool": median(one.pool_wall_s / one.ray_wall_s for one in rounds),
        "second_epoch_decodes": num_decodes,
        "prepare_medians": {
            "num_videos": len(videos),
            **{name: median(asdict(one)[name] for one in rounds) for name in asdict(rounds[0])},
        },
    }


def _rounds(config: PrepareCost, videos: Sequence[Path], work: Path, say: Callable[[str], None]) -> list[Round]:
    rounds = []
    say(f"{len(videos)} videos, s: CPU loop, wall pool, wall ray, CPU ray (driver + workers + decoders | Ray's own)")
    with multiprocessing.get_context("spawn").Pool(NUM_CPUS) as pool:
        pool.map(_decode, videos[:NUM_WARM], chunksize=1)
        _prepare(videos[:NUM_WARM], work / "warm")
        for number in range(config.num_rounds_prepare):
            one = _round(pool, videos, work / f"round-{number}")
            rounds.append(one)
            parts = (
                f"{one.driver_cpu_s:.2f} + {one.worker_cpu_s:.2f} + {one.decoder_cpu_s:.2f} | {one.server_cpu_s:.2f}"
            )
            say(f"{one.loop_cpu_s:10.2f}{one.pool_wall_s:10.2f}{one.ray_wall_s:10.2f}{one.our_cpu_s:10.2f} ({parts})")
    return rounds


def many_videos(config: PrepareCost, folder: Path) -> list[Path]:
    """`config.num_videos` files: the real videos under many names, or generated ones where there are none."""
    originals = real_videos(config.videos) or _stand_ins(folder.with_name("stand-ins"))
    wanted = {
        f"{number:05d}{original.suffix}": original
        for number, original in zip(range(config.num_videos), itertools.cycle(originals), strict=False)
    }
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != wanted.keys():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, original in wanted.items():
            shutil.copyfile(original, folder / name)
    return [folder / name for name in wanted]


def second_epoch_decodes(videos: Sequence[Path], folder: Path) -> int:
    """Clips that are decoded after the first epoch: by another plan over them, and by reading either plan again.

    While both stores are read twice the videos are away, so that nothing could decode them.

    Raises:
        AssertionError: a store gave other frames the second time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    media = folder / "media"
    media.mkdir(parents=True)
    for video in videos:
        os.link(video, media / video.name)
    _write_records(folder / "records.json", videos)
    _write_processor(folder / "model")

    def run(name: str, seed: int) -> int:
        config = PipelineConfig(
            records=(folder / "records.json",),
            media_root=(media,),
            model=folder / "model",
            windows_dir=folder / name,
            shards_dir=folder / "shards",
            seed=seed,
            window_size=16,
        )
        return run_pipeline(config).clips_decoded

    first, second = run("plan-1", 1), run("plan-2", 2)
    assert first == len(videos), f"the first epoch decodes every video once, it decoded {first} of {len(videos)}"
    media.rename(folder / "away")
    for name in ("plan-1", "plan-2"):
        sums = [sum(int(f.sum()) for one in _samples(folder / name) for f in one.frames) for _ in range(2)]
        assert sums[0] == sums[1] > 0, f"{name} gave other frames the second time: {sums}"
    return second


def _round(pool: multiprocessing.pool.Pool, videos: Sequence[Path], output: Path) -> Round:
    cpu_s = time.process_time()
    for video in videos:
        _decode(video)
    loop_cpu_s = time.process_time() - cpu_s
    start = time.perf_counter()
    pool.map(_decode, videos, chunksize=4)
    pool_wall_s = time.perf_counter() - start
    with TreeWatch() as watch:
        before, start = watch.cpu_s(), time.perf_counter()
        _prepare(videos, output)
        ray_wall_s = time.perf_counter() - start
        after = watch.cpu_s()
    driver, worker, decoder, servers = (after[kind] - before[kind] for kind in ("driver", "worker", "decoder", "ray"))
    shutil.rmtree(output)
    return Round(loop_cpu_s, pool_wall_s, ray_wall_s, driver, worker, decoder, servers)


def _decode(video: Path) -> int:
    """The number of frames."""
    return len(decode.frames(video, FrameSampling(), crop=Crop()))


def _prepare(videos: Sequence[Path], output: Path) -> None:
    """All of jobs/prepare.py but its start; `videos` are the first of their folder."""
    source = output.with_name(f"{output.name}-source")
    source.mkdir(parents=True)
    for video in videos:
        os.link(video, source / video.name)
    with contextlib.redirect_stderr(io.StringIO()):
        summary = prepare(PrepareConfig(sources=(SourceConfig(path=str(source)),), output=output))
    assert summary.ok == summary.clips_decoded == len(videos), f"every video is decoded, got {summary}"
    shutil.rmtree(source)


def _stand_ins(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.mp4" for seed in range(NUM_STAND_INS)]
    for seed, path in enumerate(paths):
        if not path.is_file():
            write_long_clip(path, seed=seed, num_bframes=2, seconds=STAND_IN_S)
    return paths


def _write_records(path: Path, videos: Sequence[Path]) -> None:
    turns = [{"from": "human", "value": "<video>\nWhat is moving?"}, {"from": "gpt", "value": "A red circle."}]
    records = [{"id": video.stem, "video": video.name, "conversations": turns} for video in videos]
    path.write_text(json.dumps(records), encoding="utf-8")


def _write_processor(folder: Path) -> None:
    """A model folder without a model: a plan needs its crops and its tokenizer only."""
    from valley_ray.model.backbones import add_tokens
    from valley_ray.nano.language import make_tokenizer
    from valley_ray.processor import ProcessorConfig, ValleyProcessor

    tokenizer = make_tokenizer()
    add_tokens(tokenizer)
    ValleyProcessor(tokenizer, ProcessorConfig(num_patches=4)).save_pretrained(folder)


def _samples(directory: Path) -> Iterator[Sample]:
    store = WindowStore(directory)
    return (sample for manifest in store.committed() for sample in store.read(manifest))
