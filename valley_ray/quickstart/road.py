"""Generated videos → trained nano Valley → answers over HTTP.

Ray Data makes the clips and decodes them into windows, Ray Train with DeepSpeed runs both stages on them, the engine
answers held-out questions in this process, Ray Serve answers some of them again over HTTP.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from valley_ray.nano.backbones import BackboneProgress, make_backbones
from valley_ray.nano.clips import Split
from valley_ray.nano.make import WorldConfig, write_clips, write_record_files
from valley_ray.quickstart.asking import ask_in_process, ask_over_http
from valley_ray.quickstart.config import QuickstartConfig
from valley_ray.quickstart.report import Report, print_report, score
from valley_ray.session import connect, quiet_ray_data
from valley_ray.storage import storage_root
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.trainer import TrainResult, train


def run(config: QuickstartConfig) -> Report:
    """Run all of it, on the Ray that RAY_ADDRESS names or on one of its own; returns what report.json holds.

    The report: `accuracy` and `chance` per question kind (flat, 0..1), `harder` and `harder_chance` likewise,
    `num_held_out` clips, `served` {num, num_equal}, `seconds` per part.
    """
    start = time.perf_counter()
    root, model = storage_root() / config.root, storage_root() / config.model
    _clear(root)
    connect()
    quiet_ray_data()
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        make_data(root / "data", config.world)
    with _timed(seconds, "backbones"), _bars() as on_progress:
        make_backbones(root / "backbones", config.nano, on_progress=on_progress)
    trained = train_stages(config, root, model)
    seconds |= trained.seconds
    with _timed(seconds, "evaluate"):
        asked = json.loads((root / "data" / "heldout.json").read_text(encoding="utf-8"))
        answers = ask_in_process(model, root / "data", asked)
    report = score(root / "data", asked, answers)
    report["num_held_out"] = config.world.num_held_out
    with _timed(seconds, "serve"):
        _say(f"serving {model} and asking about {config.num_served} clips over HTTP")
        report["served"] = ask_over_http(root / "data", model, asked, answers, num_served=config.num_served)
    seconds["total"] = time.perf_counter() - start
    report["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    report["num_steps"] = trained.num_steps
    (root / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(root, model, trained.curve_path, asked, answers, report)
    return report


def make_data(data_root: Path, world: WorldConfig) -> None:
    """Generate all clips as .mp4 with Ray Data, and the record files beside them."""
    write_record_files(data_root, world)
    for split in (world.train, world.held_out):
        _say(f"generating {sum(count for _, count in split.num_scenes)} clips for {split.name}")
        _generate(data_root, split)
    shared = {scene.digest for _, scene in world.train.scenes()} & {s.digest for _, s in world.held_out.scenes()}
    assert not shared, f"{len(shared)} clips are both in train and held out"


def _generate(data_root: Path, split: Split) -> None:
    import ray.data

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        write_clips(data_root, split, [str(stem) for stem in batch["stem"]])
        return batch

    stems = ray.data.from_items([{"stem": stem} for stem, _ in split.scenes()])
    made = stems.repartition(16).map_batches(encode, batch_size=None).count()
    assert made == sum(count for _, count in split.num_scenes), f"{made} clips were made"


def train_stages(config: QuickstartConfig, root: Path, model: Path) -> TrainResult:
    """Both stages in one Ray Train run, fed by the data pipeline that decodes beside it."""
    _say("training: the data pipeline decodes into shards while stage 1 begins")
    return train(
        TrainConfig(
            model=root / "backbones",
            output=model,
            storage=str(root),
            run_name="train",
            data=DataConfig(
                mode="overlap",
                pipeline={
                    "records": [root / "data" / "train.json"],
                    "media_root": root / "data",
                    "windows_dir": root / "windows",
                    "window_size": 384,
                },
            ),
            stages=config.stages,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.global_batch_size // config.num_workers,
            num_workers=config.num_workers,
            cpus_per_worker=0.5,
            log_every=10,
            checkpoint_every=150,
            feature_cache_bytes=256 * 2**20,
        )
    )


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


@contextmanager
def _bars() -> Iterator[Any]:
    """A progress bar per backbone."""
    _say("training the two nano backbones: a vision tower on captions, a small LLaMA on words")
    bars: dict[str, Any] = {}

    def on_progress(progress: BackboneProgress) -> None:
        bar = bars.get(progress.name)
        if bar is None:
            bar = bars[progress.name] = tqdm(desc=f"{progress.name:<8}", total=progress.num_steps, position=len(bars))
        bar.set_postfix(loss=f"{progress.loss:.3f}", refresh=False)
        bar.update(progress.step - bar.n)

    yield on_progress
    for bar in bars.values():
        bar.close()


def _clear(root: Path) -> None:
    """Remove what an earlier quickstart wrote, and nothing else."""
    for name in ("data", "backbones", "windows", "train"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "report.json").unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MPLCONFIGDIR", str(root / "matplotlib"))
