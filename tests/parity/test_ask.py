"""`valley-ray ask` on the outside sets: every checkpoint answers; every video is answered or refused in one line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity_set import ROOT as PARITY
from parity_set import load_json

from valley_ray.cli import main

REPOSITORY = Path(__file__).parents[2]
ROOT = Path(os.environ.get("VALLEY_VIDEOS", REPOSITORY.parent / "shared" / "videos"))
QUESTION = "What is moving?"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """`ask` owns its process and sets torch's threads; here it does not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_checkpoint_answers_about_video_image_and_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    recorded = load_json("media.json")
    media = {"video": recorded["video"], "image": recorded["image"]["file"]}
    files = {kind: next((PARITY / "media").rglob(Path(name).name), None) for kind, name in media.items()}
    options = [[f"--{kind}", os.path.relpath(file)] for kind, file in files.items() if file is not None]
    for folder in sorted({path.parent for path in (PARITY / "checkpoints").glob("*/*config.json")}):
        for shown_media in ([], *options):
            command = ["ask", "--model", os.path.relpath(folder), *shown_media, QUESTION, "--max-tokens", "8", "--json"]
            code = main(command)
            shown = capfd.readouterr()
            assert code == 0, f"{' '.join(command)}: {shown.err}"
            assert json.loads(shown.out)["num_tokens"] > 0, command


def test_every_file_yields_an_answer_or_a_named_reason(tiny_valley: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not ROOT.is_dir():
        pytest.skip(f"{ROOT} is absent; set VALLEY_VIDEOS to a set of videos")
    problems = []
    for path in sorted(path for path in ROOT.iterdir() if path.is_file()):
        command = ["ask", "--model", str(tiny_valley), "--video", str(path), QUESTION]
        code = main([*command, "--max-tokens", "8"])
        shown = capfd.readouterr()
        answered = code == 0 and shown.out.strip() and not shown.err
        line = shown.err.removeprefix("valley-ray: error: ")
        refused = code == 2 and not shown.out and path.name in line and line.count("\n") == 1 and line != shown.err
        if not answered and not refused:
            problems.append(f"{path.name}: exit code {code}, stdout {shown.out!r}, stderr {shown.err!r}")
    assert problems == []
