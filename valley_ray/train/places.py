"""Where a run writes: refused where that would take something away, or where nothing can be written. Knows no Ray."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig
from valley_ray.train.run_folder import run_folder


def check_places(config: TrainConfig) -> None:
    """Refuse an `output` that would replace what the run needs, and an `output` or a `storage` that cannot be written.

    Leaves nothing behind.

    Raises:
        ConfigError: with the setting and the fix.
    """
    folder = run_folder(config.storage, config.run_name or "any")
    needed = [*_inputs(config), *([("the folder of the run", folder.local)] if folder.is_local else [])]
    output = config.output.resolve()
    for what, path in needed:
        found = path.resolve()
        if found == output or output in found.parents:
            raise ConfigError(
                f"output={str(config.output)!r} is replaced as a whole by the trained model, and {what} {found} lies "
                "in it; name another output"
            )
    _check_writable(output.parent, "output", config.output)
    if folder.is_local:
        _check_writable(folder.local, "storage", config.storage)


def _inputs(config: TrainConfig) -> Iterator[tuple[str, Path]]:
    yield "model", config.model
    data = config.data
    if data.mode == "shards" and data.windows_dir is not None:
        yield "data.windows_dir", data.windows_dir
    pipeline = data.pipeline or {} if data.mode == "overlap" else {}
    for name in ("records", "media_root", "windows_dir", "shards_dir"):
        given = pipeline.get(name)
        for one in given if isinstance(given, list | tuple) else (given,):
            if isinstance(one, str | Path) and "://" not in str(one):
                yield f"data.pipeline.{name}", Path(one)


def _check_writable(folder: Path, setting: str, given: str | Path) -> None:
    """Look at the folder, or at the nearest one above it that is there."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{setting}={str(given)!r}: {there} is a file; name a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(
            f"{setting}={str(given)!r}: nothing can be written to {there} ({error.strerror}); name another folder"
        ) from error
