"""What is typed after jobs/answer.py → settings. Starts nothing; makes the generated clips where nothing is named."""

from collections.abc import Callable, Sequence
from pathlib import Path

from valley_ray.config import COMMAND_LINE, apply_overrides, read_yaml, validate_config
from valley_ray.errors import ConfigError
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.storage import storage_root

INPUT, QUESTION = "input=", "question="
"""What follows these is taken as it is typed; in YAML a question with `: ` or ` #` would be something else."""


def read_words(
    words: Sequence[str],
    *,
    inputs: Sequence[str] = (),
    media_root: str | None = None,
    output: str | None = None,
    default: Path,
    say: Callable[[str], None],
) -> AnswerSettings:
    """Settings with absolute paths.

    Args:
        words: at most one configuration file, settings as ``key=value``, inputs as ``input=PATH``.
        inputs: files of records, folders of media; with those of `words` they stand for the sources of the file.
        media_root, output: the settings of that name.
        default: configuration where nothing names a source; what it works on is made, and `say` gets a line.

    Raises:
        ConfigError: several files, one that cannot be read, or a setting that cannot be used.
        CheckpointError: nothing names a source, but a model that is none.
    """
    if len(paths := [Path(word) for word in words if "=" not in word]) > 1:
        raise ConfigError(f"expected one configuration file, got {' and '.join(map(str, paths))}; drop one")
    overrides = [word for word in words if "=" in word and not word.startswith((INPUT, QUESTION))]
    inputs = [*inputs, *_after(INPUT, words)]
    if inputs and any(word.startswith("sources=") for word in overrides):
        raise ConfigError("input= and sources= both say what is asked about; drop one")
    is_generated = not paths and not inputs and not any(word.startswith("sources=") for word in overrides)
    path = default if is_generated else next(iter(paths), None)
    named: dict[str, object] = {
        "sources": [{"path": one} for one in inputs],
        "media_root": media_root,
        "output": output,
        "question": next(reversed(_after(QUESTION, words)), None),
    }
    values = (read_yaml(path) if path is not None else {}) | {name: value for name, value in named.items() if value}
    apply_overrides(values, overrides)
    source = str(path) if path is not None else COMMAND_LINE
    settings = validate_config(AnswerSettings, values, source=source, overrides=overrides).under(storage_root())
    if is_generated:
        from valley_ray.evaluate.generated import make_generated

        return make_generated(settings, storage_root(), say=say)
    return settings


def _after(prefix: str, words: Sequence[str]) -> list[str]:
    return [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
