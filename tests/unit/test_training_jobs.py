"""jobs/finetune.py and jobs/pretrain.py: options, endings, and what of the nano world they make."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from valley_ray.cli.training import run_job
from valley_ray.config import load_config
from valley_ray.nano import make
from valley_ray.nano.backbones import CONFIG_FILE, NanoConfig
from valley_ray.nano.make import WorldConfig, make_clips, take_over_backbones, take_over_clips
from valley_ray.train.config import TrainConfig
from valley_ray.train.stage_config import StageConfig

ROOT = Path(__file__).parents[2]
NANO = ROOT / "jobs" / "configs" / "nano.yaml"
SMALL = WorldConfig(num_train=2, num_held_out=1, num_train_harder=0, num_held_out_harder=0)

Job = Callable[..., int]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Run a job in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VALLEY_STORAGE", raising=False)

    def run(*arguments: str, **options: Any) -> int:
        return run_job("finetune", arguments, about="About.", default=NANO, **options)

    return run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tiny_valley: Path) -> list[str]:
    """What of the nano world was asked for; clips are two, backbones a tiny model."""
    asked: list[str] = []

    def clips(data_root: Path, world: WorldConfig, *, say: Any) -> None:
        asked.append("clips")
        make_clips(data_root, SMALL, say=say)

    def backbones(folder: Path, nano: NanoConfig, *, say: Any) -> None:
        asked.append("backbones")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(tiny_valley)

    monkeypatch.setattr(make, "make_clips", clips)
    monkeypatch.setattr(make, "make_missing_backbones", backbones)
    return asked


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("finetune", "pretrain"):
        shown = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert f"python jobs/{name}.py" in shown
        for key in (*TrainConfig.model_fields, *StageConfig.model_fields, "--check"):
            assert f"  {key}" in shown, key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a.yaml", "b.yaml"), "got a.yaml and b.yaml; drop all but one"),
        (("none.yaml",), "cannot read configuration none.yaml"),
        (("--chekc",), "unrecognized arguments: --chekc"),
        (("num_worker=3",), "did you mean 'num_workers'"),
        (("data.pipeline.window_sise=3",), "did you mean 'window_size'"),
        (("stages.4.max_steps=2",), "stages is a list of 2"),
        (("model=nothing",), "is no model folder"),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(
    job: Job, made: list[str], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert job(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("finetune: error: ")
    assert error.count("\n") == 1
    assert made == []


def test_another_model_makes_no_backbones(
    job: Job, made: list[str], tiny_valley: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("--check", f"model={tiny_valley}", "global_batch_size=2", "micro_batch_size=1") == 0
    assert made == ["clips"]
    assert not (tmp_path / "runs" / "nano" / "backbones").exists()
    assert "stage1     70 steps of 2 samples" in capsys.readouterr().out


def test_data_of_ones_own_makes_no_clips(job: Job, made: list[str], tmp_path: Path) -> None:
    make_clips(tmp_path / "mine", SMALL, say=print)
    own = "data.pipeline.records=[mine/train.json]", "data.pipeline.media_root=mine"
    assert job("--check", *own, "global_batch_size=2", "micro_batch_size=1") == 0
    assert made == ["backbones"]


def test_the_first_stage_alone_is_run_and_a_second_one_refused(
    job: Job, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "global_batch_size=2", "micro_batch_size=1"
    assert job("--check", *sizes, first_stage_alone=True) == 0
    shown = capsys.readouterr().out
    assert "stage1" in shown
    assert "stage2" not in shown
    assert job("--check", "stages.0.trainable=[projector,lora]", first_stage_alone=True) == 2
    assert "trains lora, which is for a second stage; run jobs/finetune.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["valley-stage2.yaml", "valley-stage2-lora.yaml", "valley-stage2-zero3.yaml"])
def test_a_second_stage_without_the_first_names_the_job_to_run(
    job: Job, made: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = NANO.with_name(name)
    for words in ((str(path),), (str(path), "--check")):
        assert job(*words) == 2
        error = capsys.readouterr().err
        assert f"python jobs/pretrain.py {path.with_name('valley-stage1.yaml')} makes it" in error
        assert error.count("\n") == 1
    assert job(str(path), "model=mine") == 2
    assert "is no model folder" in capsys.readouterr().err
    assert made == []


def test_the_nano_configurations_share_what_is_decoded() -> None:
    both, first = (load_config(TrainConfig, NANO.with_name(name)) for name in ("nano.yaml", "nano-stage1.yaml"))
    assert first.data == both.data
    assert first.stages == both.stages[:1]
    assert (first.model, first.seed) == (both.model, both.seed)


def test_what_the_quickstart_made_is_taken_over_where_it_is_the_same(tmp_path: Path, tiny_valley: Path) -> None:
    said: list[str] = []
    source, target = tmp_path / "quickstart", tmp_path / "nano"
    make_clips(source / "data", SMALL, say=said.append)
    other = SMALL.model_copy(update={"num_train": 3})
    take_over_clips(source / "data", target / "data", other, say=said.append)
    assert not target.exists(), "another number of clips"
    take_over_clips(source / "data", target / "data", SMALL, say=said.append)
    clips = sorted(path.relative_to(target) for path in target.rglob("*.mp4"))
    assert len(clips) == 3
    assert os.path.samefile(source / clips[0], target / clips[0]), "linked, not copied"
    backbones = source / "backbones"
    backbones.mkdir()
    (backbones / "config.json").write_text("{}")
    (backbones / CONFIG_FILE).write_text(NanoConfig().model_dump_json())
    take_over_backbones(backbones, target / "backbones", NanoConfig(), say=said.append)
    assert (target / "backbones" / "config.json").read_text() == "{}"
    (backbones / "config.json").write_text("[]")
    take_over_backbones(backbones, target / "backbones", NanoConfig(), say=said.append)
    assert (target / "backbones" / "config.json").read_text() == "{}", "what is there stays"
    small = json.loads(NanoConfig().model_dump_json())
    small["tower"]["num_steps"] = 7
    (backbones / CONFIG_FILE).write_text(json.dumps(small))
    take_over_backbones(backbones, tmp_path / "third", NanoConfig(), say=said.append)
    assert not (tmp_path / "third").exists(), "made with other settings"


def start_making_backbones(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """jobs/finetune.py up to where both processes of the backbones write their draft."""
    (folder / "runs" / "nano" / "data").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "nano" / "data" / "train.json").write_text("[]")
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VALLEY_STORAGE": str(folder)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: list((folder / "runs" / "nano").glob(".backbones.*")) != [], process)
    wait_for(lambda: sum("spawn_main" in " ".join(one.cmdline()) for one in children(process)) == 2, process)
    return process, children(process)


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not is_so():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)


def test_sigterm_while_backbones_are_made_leaves_no_process_and_no_draft(tmp_path: Path) -> None:
    process, begun = start_making_backbones(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143
    assert error.splitlines()[-1].startswith("finetune: stopped")
    psutil.wait_procs(begun)
    assert [path.name for path in (tmp_path / "runs" / "nano").iterdir()] == ["data"]


@pytest.mark.slow
def test_processes_of_a_killed_job_end_and_the_next_run_removes_its_draft(tmp_path: Path) -> None:
    process, begun = start_making_backbones(tmp_path)
    process.kill()
    process.communicate()
    psutil.wait_procs(begun)
    (draft,) = (tmp_path / "runs" / "nano").glob(".backbones.*")
    again, _ = start_making_backbones(tmp_path)
    wait_for(lambda: not draft.exists(), again)
    again.send_signal(signal.SIGTERM)
    again.communicate()
    assert [path.name for path in (tmp_path / "runs" / "nano").iterdir()] == ["data"]
