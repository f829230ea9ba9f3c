"""What cannot work is said before any worker starts, with its fix; what can is let through."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_valley
from train_store import make_store
from transformers import PreTrainedModel

from valley_ray.config import load_config
from valley_ray.errors import CheckpointError, ConfigError, DataError, ValleyError
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.check import check_run
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.trackers import MODULES

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"

FIRST = StageConfig(name="first", trainable="valley-stage1", learning_rate=1e-3, max_steps=2)
SECOND = StageConfig(name="second", trainable="valley-stage2", learning_rate=1e-3, max_steps=2)
LORA = StageConfig(name="adapter", trainable="valley-stage2-lora", learning_rate=1e-3, max_steps=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path) -> Path:
    return make_store(tmp_path_factory.mktemp("check") / "store", tiny_valley, num_samples=12)


@pytest.fixture
def config(tiny_valley: Path, store: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        values = {"model": tiny_valley, "output": tmp_path / "out", "data": DataConfig(windows_dir=store)}
        sizes = {"stages": (FIRST, SECOND), "global_batch_size": 4, "micro_batch_size": 2}
        return TrainConfig(**{**values, **sizes, **changes})

    return make


@pytest.fixture
def changed_model(tiny_valley: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with other values in one of its JSON files."""

    def change(file: str, **values: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_valley, folder)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return change


@pytest.fixture(scope="module")
def fresh_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `from_backbones` leaves it: no stage has trained the projector."""
    folder = make_tiny_valley(tmp_path_factory.mktemp("fresh") / "model")
    model = ValleyForConditionalGeneration.from_pretrained(folder)
    torch.nn.init.zeros_(model.core.mm_projector.bias)
    model.save_pretrained(folder)
    return folder


def refused(config: TrainConfig, said: str, error: type[ValleyError] = ConfigError) -> None:
    with pytest.raises(error) as caught:
        check_run(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_work_is_let_through_without_a_word(config: Callable[..., TrainConfig], fresh_model: Path) -> None:
    for stages in ((FIRST, SECOND), (SECOND,), (LORA,), (FIRST, LORA)):
        assert check_run(config(stages=stages)) == ()
    assert check_run(config(model=fresh_model, stages=(FIRST, SECOND))) == ()


def test_stage_2_without_a_stage_1_projector_is_refused(config: Callable[..., TrainConfig], fresh_model: Path) -> None:
    for stage in (SECOND, LORA):
        refused(config(model=fresh_model, stages=(stage,)), "on a projector that no stage has trained")
    assert check_run(config(model=fresh_model, stages=(SECOND,), allow_random_projector=True)) == ()
    alone = StageConfig(name="head", trainable="projector", learning_rate=1, max_steps=1)
    assert check_run(config(model=fresh_model, stages=(alone,))) == ()


def test_one_step_of_stage_1_makes_a_trained_projector(config: Callable[..., TrainConfig], fresh_model: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(fresh_model)
    visual = model.core.visual_tokens(torch.rand(2, 17, 32))
    optimizer = torch.optim.AdamW(model.core.mm_projector.parameters(), lr=1e-6)
    visual.square().sum().backward()
    optimizer.step()
    trained = fresh_model.with_name("trained")
    model.save_pretrained(trained)
    ValleyProcessor.from_pretrained(fresh_model).save_pretrained(trained)
    assert check_run(config(model=trained, stages=(SECOND,))) == ()


def test_a_projector_with_torchs_own_numbers_is_a_warning(
    config: Callable[..., TrainConfig], tiny_valley: Path, tmp_path: Path
) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    model.core.mm_projector.reset_parameters()
    model.save_pretrained(tmp_path / "model")
    ValleyProcessor.from_pretrained(tiny_valley).save_pretrained(tmp_path / "model")
    (warning,) = check_run(config(model=tmp_path / "model", stages=(SECOND,)))
    assert "as torch draws them" in warning


def test_model_folders_that_cannot_be_trained_are_refused(
    config: Callable[..., TrainConfig], tiny_valley: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("do not delete")
    refused(config(model=tmp_path / "nothing"), "no model folder")
    refused(config(output=tiny_valley), "same folder")
    refused(config(output=tmp_path / "precious"), "something else than a model")
    refused(config(output=tmp_path / "precious" / "thesis.txt"), "is a file")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(config(model=tmp_path), f"valley-ray compose --tower TOWER --language-model {tmp_path}", CheckpointError)


def test_an_output_that_would_take_something_away_is_refused(
    config: Callable[..., TrainConfig], tiny_valley: Path, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tiny_valley)
    refused(config(output=tmp_path / "link"), "same folder")
    shutil.copytree(tiny_valley, tmp_path / "held")
    shutil.copytree(tiny_valley, tmp_path / "held" / "model")
    held = config(model=tmp_path / "held" / "model", output=tmp_path / "held" / "model" / "..")
    refused(held, f"model {tmp_path / 'held' / 'model'} lies in it")
    runs = str(tmp_path / "out" / "runs")
    refused(config(storage=runs, run_name="one"), f"the folder of the run {runs}/one lies in it; name another output")
    refused(config(storage=str(tmp_path), run_name="out"), "the folder of the run")
    shutil.copytree(tiny_valley, tmp_path / "both")
    shutil.copytree(store, tmp_path / "both" / "store")
    refused(config(output=tmp_path / "both", data=DataConfig(windows_dir=tmp_path / "both" / "store")), "windows_dir")
    inside = config(output=tmp_path / "held" / "model" / "out", model=tmp_path / "held" / "model")
    assert check_run(inside) == ()


def test_folders_that_cannot_be_written_are_named(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(config(output=tmp_path / "file" / "out"), f"{tmp_path / 'file'} is a file; name a folder")
    refused(config(storage=str(tmp_path / "file")), "storage=")
    refused(config(storage="/proc/runs"), "nothing can be written to /proc")
    refused(config(storage="nosuch://bucket/runs"), "cannot be used")
    assert not list(tmp_path.glob("out*"))


def test_settings_for_answering_alone_are_refused(
    config: Callable[..., TrainConfig], changed_model: Callable[..., Path]
) -> None:
    folder = changed_model("config.json", splice="upstream")
    refused(config(model=folder), "splice='upstream'")
    shutil.rmtree(folder)
    folder = changed_model("processor_config.json", prompt_style="upstream-serve")
    refused(config(model=folder), "train with 'valley' or 'upstream-train'")


def test_packing_is_refused_where_samples_cannot_share_a_row(
    config: Callable[..., TrainConfig], changed_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(config(model=changed_model("config.json", splice="upstream"), pack_tokens=64), "splice='upstream'")
    assert check_run(config(pack_tokens=64)) == ()
    monkeypatch.setattr(PreTrainedModel, "_is_stateful", True)
    refused(config(pack_tokens=64), "carries a state from one sample of a row to the next; set pack_tokens=null")
    assert check_run(config()) == ()


def test_parts_and_adapters_that_the_model_does_not_have_are_refused(config: Callable[..., TrainConfig]) -> None:
    stage = StageConfig(name="odd", trainable=("projector", "temporal"), learning_rate=1e-3, max_steps=1)
    refused(config(stages=(stage,)), "stage odd trains temporal, which this model does not have")
    refused(config(stages=(LORA,), lora={"target_modules": ["qkv"]}), "no linear layer called qkv")
    refused(config(stages=(LORA,), lora={"rank": 3}), "did you mean 'r'")


def test_adapters_that_do_not_go_with_zero_or_with_the_stage_are_refused(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    four_bits = {"lora": {"quantize": "nf4"}}
    refused(config(stages=(LORA,), zero_stage=3, **four_bits), "lora.quantize=nf4 does not go with zero_stage=3")
    both = StageConfig(name="both", trainable=("lora", "layers"), learning_rate=1e-3, max_steps=1)
    refused(config(stages=(both,), **four_bits), "stage both trains layers, whose weights lora.quantize=nf4 rounds")
    monkeypatch.setattr("valley_ray.train.check.has_package", lambda name: False)
    refused(config(stages=(LORA,), **four_bits), "needs bitsandbytes, which is not installed")
    monkeypatch.setattr("valley_ray.train.check.has_package", lambda name: True)
    assert check_run(config(stages=(LORA,), **four_bits)) == ()
    assert check_run(config(stages=(LORA,), zero_stage=3, lora={"use_dora": True})) == ()


def test_an_adapter_that_cannot_stand_alone_is_a_warning(config: Callable[..., TrainConfig]) -> None:
    (warning,) = check_run(config(stages=(FIRST, SECOND, LORA)))
    assert "no adapter folder is written" in warning
    assert "stage second trains layers" in warning


def test_a_tracker_that_is_not_installed_is_named(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODULES, "mlflow", "a_package_that_nobody_has")
    refused(config(trackers=("tensorboard", "mlflow")), "trackers: mlflow needs")
    assert check_run(config(trackers=("tensorboard",))) == ()


def test_stores_that_cannot_be_trained_on_are_refused(
    config: Callable[..., TrainConfig], tiny_valley: Path, store: Path, tmp_path: Path
) -> None:
    refused(config(data=DataConfig(windows_dir=tmp_path)), "holds 0 windows")
    shutil.copytree(store, tmp_path / "windows" / "abc")
    refused(config(data=DataConfig(windows_dir=tmp_path)), f"did you mean {str(tmp_path / 'windows' / 'abc')!r}?")
    refused(config(global_batch_size=14), "larger than the data, 12 ok samples")
    refused(config(pack_tokens=16), "tokens, pack_tokens=16; raise it")
    broken = make_store(tmp_path / "broken", tiny_valley, num_samples=2, failed=(0, 1))
    refused(config(data=DataConfig(windows_dir=broken)), "no sample of")
    rare = FIRST.model_copy(update={"max_steps": None, "epochs": 1})
    weighted = DataConfig(windows_dir=store, weights={"records.json": 0.01})
    refused(config(stages=(rare,), data=weighted), "data.weights draw no sample in 1 epochs of stage first")
    other = ValleyProcessor.from_pretrained(tiny_valley, settings={"system_prompt": "Another."})
    shutil.copytree(tiny_valley, tmp_path / "model")
    other.save_pretrained(tmp_path / "model")
    refused(config(model=tmp_path / "model"), "made with another processor")


def test_a_store_that_has_lost_files_is_refused(
    config: Callable[..., TrainConfig], store: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(store, tmp_path / "damaged")
    (damaged / "shard-00001.arrow").unlink()
    refused(config(data=DataConfig(windows_dir=damaged)), "1 shards of the windows")
    (damaged / "store.json").unlink()
    refused(config(data=DataConfig(windows_dir=damaged)), "has lost its store.json")


def test_files_that_are_not_there_are_named(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    def overlap(**changes: Any) -> TrainConfig:
        pipeline = {"records": [str(tmp_path / "r.json")], "media_root": str(tmp_path), "windows_dir": "w"}
        return config(data=DataConfig(mode="overlap", pipeline=pipeline | changes))

    refused(overlap(), f"records: {tmp_path / 'r.json'} is not there")
    (tmp_path / "r.json").write_text("[]")
    refused(overlap(media_root=str(tmp_path / "media")), f"media_root: {tmp_path / 'media'} is no folder")
    refused(overlap(window_sise=3), "did you mean 'window_size'")
    refused(overlap(model="another"), "differs from")
    weighted = overlap()
    data = weighted.data.model_copy(update={"weights": {"r.json": 2.0, "q.json": 1.0}})
    refused(weighted.model_copy(update={"data": data}), "data.weights names q.json")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "r.json").write_text("[]")
    twice = overlap(records=[str(tmp_path / "r.json"), str(tmp_path / "second" / "r.json")])
    data = twice.data.model_copy(update={"weights": {"r.json": 2.0, "r.json#2": 0.5}})
    assert check_run(twice.model_copy(update={"data": data})) == ()
    assert check_run(overlap()) == ()


def test_a_held_out_split_that_is_not_there_is_named(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    split = EvaluationConfig(sources=({"path": str(tmp_path / "heldout.json")},))
    refused(config(evaluation=split), "heldout.json", DataError)


def test_the_shipped_configurations_of_the_original_wait_only_for_their_model() -> None:
    for path in sorted(CONFIGS.glob("valley-*.yaml")):
        refused(load_config(TrainConfig, path), "is no model folder")
