"""Any model folder that opens, or a tower and a language model, become a modern folder.

It has safetensors, processor, tokenizer, generation config and model card, and is written whole or not at all.
Adapters are merged on the way, since opening a folder merges them. Knows no layout of weight files: `valley_ray.model`
opens them.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from valley_ray.answering import check_fit
from valley_ray.chat.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from valley_ray.chat.tokens import ADDED_TOKENS, Tokenizer
from valley_ray.errors import CheckpointError
from valley_ray.media.sampling import FrameSampling
from valley_ray.model.backbones import open_backbones
from valley_ray.model.towers import CHINESE
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.processor.upstream import DEFAULT_MAX_LENGTH, tower_processor_config

CARD_FILE = "README.md"
SHARD_SIZE = "5GB"

_LICENSE = re.compile(r"\A---\n(?:.*\n)*?license: *(\S.*)\n(?:.*\n)*?---\n")
"""In the front matter of a model card."""


def convert(
    source: str | Path, output: str | Path, *, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Open the model folder `source` and write it as `output`; both give equal logits.

    Args:
        source: any folder that `from_pretrained` opens: the original's released layout, LoRA, or ours.
        output: a new or empty folder.
        base: the model under a bare adapter folder; None: the one that the adapter names.
        dtype: of the written weights; None: as in the files.

    Raises:
        CheckpointError: `source` cannot be opened, `output` holds something already or cannot be written.
    """
    source, output = Path(source), Path(output)
    check_output(output)
    model, processor = open_whole(source, base=base, dtype=dtype)
    origin = {"converted from": f"`{source.resolve().name}`"}
    _write(model, processor, output, origin=origin, license_name=_license_of(source))


def open_whole(
    source: Path, *, base: str | Path | None, dtype: torch.dtype | None
) -> tuple[ValleyForConditionalGeneration, ValleyProcessor]:
    """A model folder, adapters merged, and its processor or, where `base` is named, that of the base."""
    model = ValleyForConditionalGeneration.from_pretrained(source, dtype=dtype or "auto", base=base)
    return model, ValleyProcessor.from_pretrained(source if base is None else Path(base))


def compose(
    tower: str | Path,
    language_model: str | Path,
    output: str | Path,
    *,
    pooling: str = "mean",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> None:
    """Put a vision tower and a causal language model together as the model folder `output`, which stage 1 starts from.

    Each is a folder or a name on the hub. Images are prepared as the tower's preprocessor_config.json says. Projector
    and pooling are random, drawn from `seed`: before stage 1 the model answers nothing sensible about media.

    Args:
        pooling: mean, max, importance or delta.
        dtype: of the written weights; None: as in the files.

    Raises:
        CheckpointError: something cannot be opened or does not fit, `output` holds something already or cannot be
            written.
    """
    output = Path(output)
    check_output(output)
    torch.manual_seed(seed)
    vision, language, tokenizer = open_backbones(tower, language_model, dtype=dtype or "auto")
    model = ValleyForConditionalGeneration.from_backbones(vision, language, tokenizer, pooling=pooling)
    config = tower_processor_config(
        str(tower),
        side=model.config.image_size,
        num_patches=model.config.num_patches,
        settings=_image_settings(tower),
        is_chinese=CHINESE in vision.config.model_type,
        max_length=getattr(language.config, "max_position_embeddings", DEFAULT_MAX_LENGTH),
    )
    processor = ValleyProcessor(_tokenizer(language_model, tokenizer), config)
    origin = {
        "tower from": f"`{tower}`",
        "language model from": f"`{language_model}`",
        "projector": "random: train this folder before you ask it about media",
    }
    _write(model, processor, output, origin=origin, license_name=None)


def _write(
    model: ValleyForConditionalGeneration,
    processor: ValleyProcessor,
    output: Path,
    *,
    origin: Mapping[str, str],
    license_name: str | None,
) -> None:
    check_fit(model.config, processor)
    with whole_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(folder)
        card = model_card(model, processor, name=output.name, origin=origin, license_name=license_name)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _tokenizer(language_model: str | Path, fast: Tokenizer) -> Tokenizer:
    """LLaMA's sentencepiece model where it lies beside the weights, since upstream's ids are its; else `fast` itself.

    `fast` has the added tokens already.
    """
    path = cached_file(language_model, MODEL_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return fast
    added = {token: fast.get_added_vocab()[token] for token in ADDED_TOKENS}
    try:
        slow = SentencePieceTokenizer(Path(path).parent, added=added)
    except CheckpointError:
        return fast  # the file of another tokenizer, tiktoken's for one
    return slow if slow.get_vocab().items() >= fast.get_vocab().items() else fast


def _image_settings(tower: str | Path) -> dict[str, Any] | None:
    """The tower's preprocessor_config.json; None where it has none."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(tower)
    except OSError:
        return None
    return dict(settings)


def check_output(output: Path) -> None:
    """Raise CheckpointError where `output` is a file or a folder with something in it."""
    if output.is_dir() and any(output.iterdir()):
        raise CheckpointError(f"{output} is not empty; name a new folder, so that nothing is overwritten")
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; name a new folder")


def model_card(
    model: ValleyForConditionalGeneration,
    processor: ValleyProcessor,
    *,
    name: str,
    origin: Mapping[str, str],
    license_name: str | None,
) -> str:
    """The README.md of a written folder: what it is, what it came from, how to ask it."""
    front = ["library_name: valley_ray", "pipeline_tag: video-text-to-text", "tags: [valley, video]"]
    front += [f"license: {license_name}"] * (license_name is not None)
    rows = "\n".join(f"| {what} | {value} |" for what, value in (dict(origin) | _facts(model, processor)).items())
    licensed = (
        f"{license_name}, as the source's model card says."
        if license_name
        else "Unknown here. The source's license holds for these weights too, and so does that of the language model "
        "and of the tower under it: check them before you use or share this folder."
    )
    return _CARD.format(front="\n".join(front), name=name, rows=rows, license=licensed)


_CARD = """---
{front}
---

# {name}

A Valley model, which answers questions about videos and images, as a Hugging Face folder for valley_ray.

| | |
|---|---|
{rows}

## Ask it

    valley-ray ask --model {name} --video clip.mp4 "What is moving?"

```python
from valley_ray.assistant import Assistant

with Assistant.from_pretrained("{name}") as assistant:
    print(assistant.ask("What is moving?", video="clip.mp4").text)
```

## License

{license}
"""


def _facts(model: ValleyForConditionalGeneration, processor: ValleyProcessor) -> dict[str, str]:
    text: Any = model.config.text_config
    vision: Any = model.config.vision_config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": f"{num_parameters:,} in {str(model.dtype).removeprefix('torch.')}",
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.vocab_size:,} tokens",
        "vision tower": f"{vision.model_type}, {vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"{vision.image_size} px, {model.config.num_patches} patches, hidden state {model.config.vision_layer}",
        "pooling over time": model.config.pooling,
        "frames of a video": _frames_text(processor.sampling),
        "prompt style": f"`{processor.prompt_style}`",
    }


def _frames_text(sampling: FrameSampling) -> str:
    return f"{sampling.num_frames}, spread evenly" if sampling.num_frames else f"{sampling.fps:g} per second"


def _license_of(source: Path) -> str | None:
    """What the front matter of the source's model card says."""
    try:
        found = _LICENSE.match((source / CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return found[1].strip() if found else None


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all is written, and vanishes otherwise."""
    partial: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        # mkdtemp keeps others out; a model folder is as open as any folder that its owner makes.
        mode = output.parent.stat().st_mode & 0o777
        yield partial
        partial.chmod(mode)
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise CheckpointError(f"cannot write {output} ({reason}); free space, or name another folder") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
