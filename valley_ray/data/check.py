"""What can be known to go wrong before anything starts: sources that are not there, a folder that is not ours to write.

Looks at the first records of each source. Knows no Ray.
"""

import os
from pathlib import Path

from valley_ray.data.commit import exclusive
from valley_ray.data.config import PrepareConfig
from valley_ray.data.sources.files import is_folder, is_web, normalized, shown
from valley_ray.data.sources.registry import check_source
from valley_ray.errors import CheckpointError, DataError

CLIPS_DIR, SAMPLES_DIR = "clips", "samples"
"""Subfolders of the output that are replaced as wholes."""
TABLE_PATTERN = "part-*.parquet"


def check_prepare(config: PrepareConfig) -> None:
    """Raise what `prepare` would raise later, where it can be told from the configuration (paths absolute) alone.

    Raises:
        DataError: a source or a media root is not there or cannot be read, another run writes to the output, or what
            lies there is not of an earlier one.
        CheckpointError: there is no such model folder.
        StorageError: the output cannot be written.
    """
    for source in config.sources:
        root = normalized(source.media_root) if source.media_root is not None else None
        if root is not None and not is_web(root) and not is_folder(root):
            raise DataError(f"media_root={shown(root)}: there is no such folder; give the one that holds the media")
        check_source(source)
    if config.model is not None and not config.model.is_dir():
        raise CheckpointError(f"model={config.model}: there is no such folder; give a model folder")
    check_output(config.output)
    with exclusive(config.output, setting="output"):
        pass


def check_output(output: Path) -> None:
    """Raise DataError where a table of ours would take the place of something else."""
    for name in (CLIPS_DIR, SAMPLES_DIR):
        directory = output / name
        if not os.path.lexists(directory):
            continue
        if directory.is_symlink() or not directory.is_dir():
            raise DataError(f"{directory} is no folder of an earlier run; choose another output")
        foreign = next((one for one in sorted(directory.iterdir()) if not one.match(TABLE_PATTERN)), None)
        if foreign is not None:
            raise DataError(f"{foreign} was not written by an earlier run; choose another output, which keeps it safe")
