"""What commands that turn model folders into model folders share: options, and checks before torch is imported."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from valley_ray.cli.arguments import DTYPES
from valley_ray.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def add_source_and_output(command: argparse.ArgumentParser) -> None:
    """Two positional folders."""
    command.add_argument("source", type=Path, metavar="SOURCE", help="model folder to read")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="new folder to write")


def add_output(command: argparse.ArgumentParser) -> None:
    """--output FOLDER."""
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder to write")


def add_dtype(command: argparse.ArgumentParser) -> None:
    """--dtype TYPE, which `dtype_of` reads."""
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help="of the written weights: float32, float16, bfloat16 (default: as in the files)",
    )


def dtype_of(options: argparse.Namespace) -> "torch.dtype | None":
    """What was asked with --dtype; imports torch."""
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def check_input(folder: Path, *names: str) -> None:
    """Raise CheckpointError where the folder holds none of the files by which its kind is known."""
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} has no {' or '.join(names)}; check the path")


def check_output(folder: Path) -> None:
    """Raise CheckpointError where the folder holds something already."""
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder, so that nothing is overwritten")
