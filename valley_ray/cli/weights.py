"""`valley-ray convert`, `compose`, `merge-lora`, `make-delta` and `apply-delta`: folders in, a model folder out."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from valley_ray.cli.arguments import DTYPES
from valley_ray.cli.opening import quiet_libraries
from valley_ray.errors import CheckpointError

POOLINGS = ("mean", "max", "importance", "delta")
"""As `valley_ray.model.pooling` has them; --help must not import torch."""


def add_to(commands: Any) -> None:
    """Add the five commands to the parser."""
    _add_convert(commands)
    _add_compose(commands)
    _add_merge_lora(commands)
    _add_make_delta(commands)
    _add_apply_delta(commands)


def _add_convert(commands: Any) -> None:
    about = "Rewrite a model folder of any layout as a modern one."
    convert = commands.add_parser(
        "convert",
        help=about,
        description=f"{about} It has safetensors, processor and tokenizer, generation config and a model card. Opens "
        "the original's released folders (.bin or safetensors), LoRA folders (merged) and ours. Both folders give "
        "equal answers.",
        allow_abbrev=False,
    )
    convert.set_defaults(run=_run_convert)
    convert.add_argument("source", type=Path, metavar="SOURCE", help="model folder to read")
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="new folder to write")
    _add_dtype(convert)


def _add_compose(commands: Any) -> None:
    about = "Put a vision tower and a language model together."
    compose = commands.add_parser(
        "compose",
        help=about,
        description=f"{about} Any Hugging Face vision tower and causal language model, each a folder or a name on the "
        "hub. The projector is random: train the folder before you ask it.",
        allow_abbrev=False,
    )
    compose.set_defaults(run=_run_compose)
    compose.add_argument("--tower", required=True, metavar="NAME", help="vision tower: CLIP, ChineseCLIP, SigLIP, ...")
    compose.add_argument("--language-model", required=True, metavar="NAME", help="LLaMA, Vicuna, Qwen2, ...")
    compose.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="how frames become one set of patch tokens (default: %(default)s)",
    )
    compose.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    _add_output(compose)
    _add_dtype(compose)


def _add_merge_lora(commands: Any) -> None:
    about = "Merge a LoRA adapter into its base."
    merge = commands.add_parser(
        "merge-lora", help=about, description=f"{about} Writes a model folder as `convert` does.", allow_abbrev=False
    )
    merge.set_defaults(run=_run_merge_lora)
    merge.add_argument(
        "--adapter", type=Path, required=True, metavar="FOLDER", help="holds adapter_config.json and its weights"
    )
    merge.add_argument(
        "--base", type=Path, metavar="FOLDER", help="model that the adapter was trained on (default: as it says)"
    )
    _add_output(merge)
    _add_dtype(merge)


def _add_make_delta(commands: Any) -> None:
    about = "Write what a model adds to its base language model."
    make = commands.add_parser(
        "make-delta", help=about, description=f"{about} In float16, as the original does.", allow_abbrev=False
    )
    make.set_defaults(run=_run_make_delta)
    make.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="base language model (LLaMA)")
    make.add_argument("--target", type=Path, required=True, metavar="FOLDER", help="model that was trained from it")
    _add_output(make)


def _add_apply_delta(commands: Any) -> None:
    about = "Add a delta to its base language model."
    apply = commands.add_parser(
        "apply-delta",
        help=about,
        description=f"{about} What the original released as a delta becomes a model folder.",
        allow_abbrev=False,
    )
    apply.set_defaults(run=_run_apply_delta)
    apply.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="base language model (LLaMA)")
    apply.add_argument("--delta", type=Path, required=True, metavar="FOLDER", help="folder written by make-delta")
    _add_output(apply)


def _run_convert(options: argparse.Namespace) -> int:
    _check_input(options.source, "config.json", "adapter_config.json")
    _convert(options.source, options)
    return 0


def _run_compose(options: argparse.Namespace) -> int:
    _check_output(options.output)
    import torch

    from valley_ray.convert import compose

    quiet_libraries()
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    compose(
        options.tower, options.language_model, options.output, pooling=options.pooling, dtype=dtype, seed=options.seed
    )
    print(f"wrote {options.output}; train it: python jobs/finetune.py CONFIG.yaml with model: {options.output}")
    return 0


def _run_merge_lora(options: argparse.Namespace) -> int:
    _check_input(options.adapter, "adapter_config.json")
    if options.base is not None:
        _check_input(options.base, "config.json")
    _convert(options.adapter, options, base=options.base)
    return 0


def _run_make_delta(options: argparse.Namespace) -> int:
    _check_input(options.base, "config.json")
    _check_input(options.target, "config.json")
    from valley_ray.model.delta import make_delta

    make_delta(options.base, options.target, options.output)
    base, delta = shlex.quote(str(options.base)), shlex.quote(str(options.output))
    print(f"wrote {options.output}; to restore the model: valley-ray apply-delta --base {base}", end=" ")
    print(f"--delta {delta} --output FOLDER")
    return 0


def _run_apply_delta(options: argparse.Namespace) -> int:
    _check_input(options.base, "config.json")
    _check_input(options.delta, "config.json")
    from valley_ray.model.delta import apply_delta

    apply_delta(options.base, options.delta, options.output)
    _say_how_to_ask(options.output)
    return 0


def _convert(source: Path, options: argparse.Namespace, base: Path | None = None) -> None:
    _check_output(options.output)
    import torch

    from valley_ray.convert import convert

    quiet_libraries()
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    convert(source, options.output, base=base, dtype=dtype)
    _say_how_to_ask(options.output)


def _check_output(folder: Path) -> None:
    """Said before torch is imported."""
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder, so that nothing is overwritten")


def _say_how_to_ask(folder: Path) -> None:
    quoted = shlex.quote(str(folder))
    print(f'wrote {folder}; ask it: valley-ray ask --model {quoted} --video CLIP.mp4 "What is moving?"')


def _check_input(folder: Path, *names: str) -> None:
    """Said before torch is imported: the folder holds one of the files by which its kind is known."""
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} has no {' or '.join(names)}; check the path")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder to write")


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help="of the written weights: float32, float16, bfloat16 (default: as in the files)",
    )
