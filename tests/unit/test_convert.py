"""Converting: a whole folder with a model card, or nothing; the four commands that write folders say what is wrong."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import valley_ray.convert as convert_module
from valley_ray.cli import main
from valley_ray.convert import convert
from valley_ray.errors import CheckpointError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that `main` writes for a mistake."""
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_a_folder_of_ours_converts_to_the_same_weights_and_processor(tiny_valley: Path, tmp_path: Path) -> None:
    convert(tiny_valley, tmp_path / "new")
    before, after = (ValleyForConditionalGeneration.from_pretrained(at) for at in (tiny_valley, tmp_path / "new"))
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    fingerprints = {ValleyProcessor.from_pretrained(at).fingerprint for at in (tiny_valley, tmp_path / "new")}
    assert len(fingerprints) == 1


def test_the_card_says_what_it_is_and_how_to_ask(tiny_valley: Path, tmp_path: Path) -> None:
    convert(tiny_valley, tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: valley_ray\n")
    for part in (tiny_valley.name, "mean", "`valley`", "clip_vision_model", "llama", "valley-ray ask --model new"):
        assert part in card
    assert "\nlicense:" not in card
    assert "check them before you use or share" in card


def test_a_license_that_the_source_states_is_carried_over(tiny_valley: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_valley, source)
    (source / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-nc-4.0\n---\nlicense: mit\n")
    convert(source, tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: cc-by-nc-4.0\n" in card
    assert "Unknown" not in card


def test_the_written_type_is_the_asked_one(tiny_valley: Path, tmp_path: Path) -> None:
    assert main(["convert", str(tiny_valley), str(tmp_path / "new"), "--dtype", "float16"]) == 0
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_nothing_is_left_where_writing_fails(
    tiny_valley: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "model_card", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*new \(No space left on device\)"):
        convert(tiny_valley, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_an_empty_folder_is_taken(
    tiny_valley: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "full is not empty; name a new folder" in complaint(capsys, "convert", tiny_valley, tmp_path / "full")
    assert "notes.txt is a file" in complaint(capsys, "convert", tiny_valley, tmp_path / "full" / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tiny_valley), str(tmp_path / "empty")]) == 0
    assert "valley-ray ask --model" in capsys.readouterr().out


def test_folders_of_the_wrong_kind_are_named(
    tiny_valley: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("--output", tmp_path / "new")
    assert "no config.json or adapter_config.json" in complaint(capsys, "convert", tmp_path, tmp_path / "new")
    assert "no adapter_config.json" in complaint(capsys, "merge-lora", "--adapter", tiny_valley, *output)
    assert "no config.json" in complaint(capsys, "make-delta", "--base", tmp_path, "--target", tiny_valley, *output)
    assert "no config.json" in complaint(capsys, "apply-delta", "--base", tiny_valley, "--delta", tmp_path, *output)
    assert "required: --base" in complaint(capsys, "apply-delta", "--delta", tmp_path, *output)
    assert not (tmp_path / "new").exists()


def test_the_command_that_is_named_after_writing_can_be_pasted(
    tiny_valley: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_valley), str(tmp_path / "a b")]) == 0
    shown = shlex.split(capsys.readouterr().out.partition("ask it: ")[2])
    assert shown[shown.index("--model") + 1] == str(tmp_path / "a b")
