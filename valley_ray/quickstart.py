"""The whole road on one machine: generated videos → trained nano Valley → answers over HTTP, each step as users run it.

Ray Data makes the clips and decodes them into windows, Ray Train with DeepSpeed runs both stages on them, the engine
answers held-out questions in this process, Ray Serve answers some of them again over HTTP. Nothing here is a path of
its own: every step calls the room that does it everywhere else.
"""

import json
import logging
import os
import shutil
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tqdm import tqdm

from valley_ray.assistant import Answer, AskInput, Assistant
from valley_ray.config import Config
from valley_ray.errors import TrainingError
from valley_ray.evaluate.accuracy import Judged, accuracy_by_kind, chance_by_kind
from valley_ray.nano.backbones import BackboneProgress, NanoConfig, make_backbones
from valley_ray.nano.clips import Split
from valley_ray.nano.make import WorldConfig, write_clips, write_record_files
from valley_ray.nano.questions import HARDER_KINDS, SINGLE_KINDS
from valley_ray.serve.app import ServedApp
from valley_ray.serve.app import run as run_server
from valley_ray.serve.config import ServeConfig
from valley_ray.session import connect, quiet_ray_data
from valley_ray.storage import storage_root
from valley_ray.train.config import DataConfig, StageConfig, TrainConfig
from valley_ray.train.trainer import TrainResult, train

logger = logging.getLogger(__name__)

Report = dict[str, Any]


def nano_stages() -> tuple[StageConfig, ...]:
    """Valley's two stages, at rates and lengths for the nano model."""
    return (
        StageConfig(
            name="stage1",
            trainable=("projector",),
            learning_rate=5e-3,
            max_steps=70,
            warmup_ratio=0.1,
            betas=(0.9, 0.98),
        ),
        StageConfig(
            name="stage2",
            trainable=("projector", "language_model"),
            learning_rate=1.5e-3,
            max_steps=230,
            warmup_ratio=0.1,
            weight_decay=0.01,
            betas=(0.9, 0.98),
        ),
    )


class QuickstartConfig(Config):
    """Sizes of the quickstart; the defaults reach the numbers of the README on two CPU cores."""

    root: Path = Path("runs/quickstart")
    """Clips, backbones, shards, metrics and report; what an earlier quickstart left there is replaced."""
    model: Path = Path("models/nano")
    """The trained model folder."""
    world: WorldConfig = WorldConfig()
    """Clips and questions."""
    nano: NanoConfig = NanoConfig()
    """Backbones."""
    stages: tuple[StageConfig, ...] = Field(default_factory=nano_stages)
    """Training."""
    global_batch_size: int = 48
    """Samples per step."""
    num_workers: int = Field(default=2, ge=1)
    """Training workers, one thread each."""
    num_served: int = 40
    """Held-out clips that are asked about over HTTP; 0 leaves serving out."""


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
        answers = _ask_in_process(model, root / "data", asked)
    report = _score(config, root / "data", asked, answers)
    with _timed(seconds, "serve"):
        report["served"] = _ask_over_http(config, root, model, asked, answers)
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
            storage=root,
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


def _ask_in_process(model: Path, data_root: Path, asked: Sequence[dict[str, Any]]) -> list[Answer]:
    questions = (
        AskInput(row["conversations"][0]["value"].removeprefix("<video>\n"), video=data_root / row["video"])
        for row in asked
    )
    # Ray's processes live on the same cores: a second thread for so small a model would only wait for them.
    torch.set_num_threads(1)
    with Assistant.from_pretrained(model, num_slots=32) as assistant:
        answers = assistant.answer_batch(tqdm(questions, "held-out questions", len(asked), unit="q"))
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        raise TrainingError(f"{len(failed)} held-out clips could not be read; the first: {failed[0]}")
    return answers


def _score(
    config: QuickstartConfig, data_root: Path, asked: Sequence[dict[str, Any]], answers: Sequence[Answer]
) -> Report:
    judged = [
        Judged(row["kind"], row["conversations"][1]["value"], answer.text)
        for row, answer in zip(asked, answers, strict=True)
    ]
    truths: dict[str, list[str]] = defaultdict(list)
    for one in judged:
        truths[one.kind].append(one.truth)
    accuracy = accuracy_by_kind(judged)
    chance = chance_by_kind(truths, _known_answers(data_root))
    harder = [kind for kind in HARDER_KINDS if kind in accuracy]
    return {
        "accuracy": {kind: accuracy[kind] for kind in SINGLE_KINDS},
        "chance": {kind: chance[kind] for kind in SINGLE_KINDS},
        "harder": {kind: accuracy[kind] for kind in harder},
        "harder_chance": {kind: chance[kind] for kind in harder},
        "num_held_out": config.world.num_held_out,
    }


def _known_answers(data_root: Path) -> dict[str, list[str]]:
    """Answers of train.json by question kind; a record's id ends with the kinds of its turns."""
    known: dict[str, list[str]] = defaultdict(list)
    for row in json.loads((data_root / "train.json").read_text(encoding="utf-8")):
        kinds = row["id"].split("-", 2)[2].split("-")
        for kind, turn in zip(kinds, row["conversations"][1::2], strict=True):
            known[kind].append(turn["value"])
    return known


def _ask_over_http(
    config: QuickstartConfig, root: Path, model: Path, asked: Sequence[dict[str, Any]], answers: Sequence[Answer]
) -> dict[str, int]:
    """Ask one question about each of `num_served` clips; every kind in turn, bytes as path or data: URI in turn."""
    chosen: dict[str, int] = {}
    kinds = (*SINGLE_KINDS, *HARDER_KINDS)
    for number, row in enumerate(asked):
        wanted = kinds[len(chosen) % len(SINGLE_KINDS)]
        if len(chosen) < config.num_served and row["video"] not in chosen and row["kind"] == wanted:
            chosen[row["video"]] = number
    if not chosen:
        return {"num": 0, "num_equal": 0}
    _say(f"serving {model} and asking about {len(chosen)} clips over HTTP")
    num_equal = 0
    with run_server(ServeConfig(model=model, allow_roots=(root / "data",)), port=0, log_level="WARNING") as app:
        for number in tqdm(chosen.values(), "asked over HTTP", unit="q"):
            num_equal += _ask_server(app, root / "data", asked[number]) == answers[number].text
    return {"num": len(chosen), "num_equal": num_equal}


def _ask_server(app: ServedApp, data_root: Path, row: dict[str, Any]) -> str:
    body = {
        "model": app.model_name,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": str(data_root / row["video"])}},
                    {"type": "text", "text": row["conversations"][0]["value"].removeprefix("<video>\n")},
                ],
            }
        ],
    }
    request = urllib.request.Request(
        f"{app.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: str = json.load(reply)["choices"][0]["message"]["content"]
    return answer


def print_report(
    root: Path, model: Path, curve: Path, asked: Sequence[dict[str, Any]], answers: Sequence[Answer], report: Report
) -> None:
    """What a newcomer reads at the end."""
    print("\nHeld-out clips, never seen in training:")
    for number in [row for row in range(len(asked)) if asked[row]["kind"] != "shape"][:: max(1, len(asked) // 10)]:
        row = asked[number]
        question, truth = (turn["value"] for turn in row["conversations"])
        mark = "right" if answers[number].text == truth else "wrong"
        print(f"  {row['video']}  {question.removeprefix('<video>').strip()}")
        print(f"    answer: {answers[number].text}   truth: {truth}   ({mark})")
    print(f"\nAccuracy on {report['num_held_out']} clips (whole answers; chance in brackets):")
    for kind, value in report["accuracy"].items():
        print(f"  {kind:<10} {value:6.1%}  [{report['chance'][kind]:.1%}]")
    for kind, value in report["harder"].items():
        print(f"  {kind:<10} {value:6.1%}  [{report['harder_chance'][kind]:.1%}]  harder, few examples")
    served = report["served"]
    print(f"\n{served['num_equal']} of {served['num']} answers over HTTP equal the ones given in this process.")
    print(f"Seconds: {report['seconds']}")
    print(
        f"\nModel folder  {_short(model)}\nReport        {_short(root / 'report.json')}\nLoss curve    {_short(curve)}"
    )
    clip = _short(root / "data" / "heldout" / "single-000000.mp4")
    print("\nNext:")
    print(f'  .venv/bin/valley-ray ask --model {_short(model)} --video {clip} "What is moving?"')
    print("  .venv/bin/serve run serve_configs/valley.yaml")
    print("  .venv/bin/python jobs/finetune.py")


def _short(path: Path) -> Path:
    """Relative to the current folder where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


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
