"""`valley-ray ask` on every file of the outside video set: an answer, or one line that names the reason."""

import os
from pathlib import Path

import pytest
import torch

from valley_ray.cli import main

ROOT = Path(os.environ.get("VALLEY_VIDEOS", Path(__file__).parents[2].parent / "shared" / "videos"))


def test_every_file_yields_an_answer_or_a_named_reason(tiny_valley: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not ROOT.is_dir():
        pytest.skip(f"{ROOT} is absent; set VALLEY_VIDEOS to a set of videos")
    num_threads = torch.get_num_threads()
    problems = []
    try:
        for path in sorted(path for path in ROOT.iterdir() if path.is_file()):
            command = ["ask", "--model", str(tiny_valley), "--video", str(path), "What is moving?"]
            code = main([*command, "--max-tokens", "8"])
            shown = capfd.readouterr()
            answered = code == 0 and shown.out.strip() and not shown.err
            line = shown.err.removeprefix("valley-ray: error: ")
            refused = code == 2 and not shown.out and path.name in line and line.count("\n") == 1 and line != shown.err
            if not answered and not refused:
                problems.append(f"{path.name}: exit code {code}, stdout {shown.out!r}, stderr {shown.err!r}")
    finally:
        torch.set_num_threads(num_threads)
    assert problems == []
