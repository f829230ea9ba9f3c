"""Reads the processor of a model folder: its own files, or what upstream's layout leaves unsaid."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from valley_ray.chat.tokens import Tokenizer
from valley_ray.config import validate_config
from valley_ray.errors import CheckpointError
from valley_ray.processor.config import ProcessorConfig
from valley_ray.processor.upstream import adapter_base, is_upstream_folder, tokenizer_folder, upstream_processor_config

CONFIG_FILE = "processor_config.json"


def read_processor_config(folder: str | PathLike[str], *, settings: Mapping[str, Any] | None = None) -> ProcessorConfig:
    """Open processor_config.json of a model folder; a folder of upstream's layout has none and gets what upstream does.

    `settings` replace fields of what is read, or fields of those (``{"sampling": {"folder_order": "directory"}}``).
    Raises CheckpointError naming the file that does not fit, ConfigError
    naming the setting.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        folder = adapter_base(folder) or folder
    path = folder / CONFIG_FILE
    if path.is_file() or not is_upstream_folder(folder):
        config = validate_config(ProcessorConfig, _values_of_file(path), source=str(path))
    else:
        config = upstream_processor_config(folder)
    if not settings:
        return config
    values = config.model_dump()
    sampling = settings.get("sampling")
    if isinstance(sampling, Mapping) and sampling.keys() & {"num_frames", "fps"}:
        values["sampling"] |= {"num_frames": None, "fps": None}  # they exclude each other
    return validate_config(ProcessorConfig, _replaced(values, settings), source="settings")


def _replaced(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `settings`; a mapping in `settings` replaces what it names and leaves its neighbours."""
    result = {**values}
    for key, value in settings.items():
        before = values.get(key)
        result[key] = _replaced(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return result


def open_tokenizer(folder: Path) -> Tokenizer:
    """A model folder's tokenizer: tokenizer.json by transformers, else tokenizer.model by sentencepiece.

    In upstream's layout tokenizer.model counts where both are there: its ids are upstream's, tokenizer.json's differ
    around runs of spaces. A LoRA folder without a tokenizer takes that of its base. Raises CheckpointError naming the
    file that does not fit.
    """
    from valley_ray.chat.sentencepiece import ADDED_TOKENS_FILE, MODEL_FILE, SentencePieceTokenizer

    folder = tokenizer_folder(folder)
    has_slow_tokenizer = (folder / MODEL_FILE).is_file() and (folder / ADDED_TOKENS_FILE).is_file()
    if has_slow_tokenizer and is_upstream_folder(folder):
        return SentencePieceTokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises Exception itself, transformers whatever an odd file leads to
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder}: the tokenizer cannot be opened ({reason}); copy its files again"
            ) from error
        return tokenizer
    if (folder / MODEL_FILE).is_file():
        return SentencePieceTokenizer(folder)
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor {MODEL_FILE}; copy the tokenizer's files beside the model"
    )


def _values_of_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give a model folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(values).__name__}")
    values.pop("processor_class", None)
    return values
