"""`valley-ray convert` on every folder of the parity set that holds a model: the new folder gives the same numbers."""

from pathlib import Path

import pytest
import torch
from parity_set import ROOT, require_set

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.cli import main
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor

QUESTIONS = Conversation(
    (
        Message("user", "<video>\nWhat is moving?"),
        Message("assistant", "A square."),
        Message("user", "And here?\n<image>"),
    )
)
NUM_FRAMES = (3, 1)
SUFFIXES = {".bin", ".pt", ".pth"}
"""Of pickled weights."""


def checkpoints() -> list[Path]:
    """Folders that open by themselves: models of every layout, and adapters that name their base."""
    require_set()
    return sorted(
        path
        for path in (ROOT / "checkpoints").iterdir()
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    )


def test_every_checkpoint_converts_to_a_folder_of_equal_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing of the set is near any more
    for source in checkpoints():
        output = tmp_path / source.name
        assert main(["convert", str(source), str(output)]) == 0, capsys.readouterr().err
        names = {path.name for path in output.iterdir()}
        assert {"config.json", "processor_config.json", "generation_config.json", "README.md"} <= names, source.name
        assert not {path.suffix for path in output.iterdir()} & SUFFIXES, source.name
        assert torch.equal(logits(output), logits(source)), source.name


def test_a_converted_folder_makes_the_same_tokens_and_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in checkpoints():
        output = tmp_path / source.name
        assert main(["convert", str(source), str(output)]) == 0, capsys.readouterr().err
        before, after = ValleyProcessor.from_pretrained(source), ValleyProcessor.from_pretrained(output)
        prompts = [processor.encode_prompt(QUESTIONS, NUM_FRAMES) for processor in (before, after)]
        assert prompts[0] == prompts[1], source.name
        for kind in ("video", "image"):
            assert before.config.media_plan(kind) == after.config.media_plan(kind), source.name
        assert (before.image_mean, before.image_std) == (after.image_mean, after.image_std), source.name
        assert (before.stop_token_ids, before.stop_strings) == (after.stop_token_ids, after.stop_strings), source.name
        assert before.fingerprint == after.fingerprint, source.name
        assert before.decode(prompts[0]) == after.decode(prompts[0]), source.name


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    """Logits [1, L, V] in float32 over a conversation with two clips of noise."""
    model = ValleyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    input_ids = torch.tensor([ValleyProcessor.from_pretrained(folder).encode_prompt(QUESTIONS, NUM_FRAMES)])
    generator = torch.Generator().manual_seed(0)
    side = model.config.image_size
    clips = [torch.randn(count, 3, side, side, generator=generator) for count in NUM_FRAMES]
    output: torch.Tensor = model(input_ids, pixel_values=clips).logits
    return output
