"""`valley-ray convert`, `compose`, `merge-lora`, `make-delta` and `apply-delta`: folders in, a model folder out."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from valley_ray.cli.folders import add_dtype, add_output, add_source_and_output, check_input, check_output, dtype_of
from valley_ray.cli.opening import quiet_libraries

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
    add_source_and_output(convert)
    add_dtype(convert)


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
    add_output(compose)
    add_dtype(compose)


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
    add_output(merge)
    add_dtype(merge)


def _add_make_delta(commands: Any) -> None:
    about = "Write what a model adds to its base language model."
    make = commands.add_parser(
        "make-delta", help=about, description=f"{about} In float16, as the original does.", allow_abbrev=False
    )
    make.set_defaults(run=_run_make_delta)
    make.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="base language model (LLaMA)")
    make.add_argument("--target", type=Path, required=True, metavar="FOLDER", help="model that was trained from it")
    add_output(make)


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
    add_output(apply)


def _run_convert(options: argparse.Namespace) -> int:
    check_input(options.source, "config.json", "adapter_config.json")
    _convert(options.source, options)
    return 0


def _run_compose(options: argparse.Namespace) -> int:
    check_output(options.output)
    from valley_ray.convert import compose

    quiet_libraries()
    compose(
        options.tower,
        options.language_model,
        options.output,
        pooling=options.pooling,
        dtype=dtype_of(options),
        seed=options.seed,
    )
    print(f"wrote {options.output}; train it: python jobs/finetune.py CONFIG.yaml with model: {options.output}")
    return 0


def _run_merge_lora(options: argparse.Namespace) -> int:
    check_input(options.adapter, "adapter_config.json")
    if options.base is not None:
        check_input(options.base, "config.json")
    _convert(options.adapter, options, base=options.base)
    return 0


def _run_make_delta(options: argparse.Namespace) -> int:
    check_input(options.base, "config.json")
    check_input(options.target, "config.json")
    from valley_ray.model.delta import make_delta

    make_delta(options.base, options.target, options.output)
    base, delta = shlex.quote(str(options.base)), shlex.quote(str(options.output))
    print(f"wrote {options.output}; to restore the model: valley-ray apply-delta --base {base}", end=" ")
    print(f"--delta {delta} --output FOLDER")
    return 0


def _run_apply_delta(options: argparse.Namespace) -> int:
    check_input(options.base, "config.json")
    check_input(options.delta, "config.json")
    from valley_ray.model.delta import apply_delta

    apply_delta(options.base, options.delta, options.output)
    _say_how_to_ask(options.output)
    return 0


def _convert(source: Path, options: argparse.Namespace, base: Path | None = None) -> None:
    check_output(options.output)
    from valley_ray.convert import convert

    quiet_libraries()
    convert(source, options.output, base=base, dtype=dtype_of(options))
    _say_how_to_ask(options.output)


def _say_how_to_ask(folder: Path) -> None:
    quoted = shlex.quote(str(folder))
    print(f'wrote {folder}; ask it: valley-ray ask --model {quoted} --video CLIP.mp4 "What is moving?"')
