"""`valley-ray export-vllm`: a model folder → a plain language model for vLLM, and what makes its prompts."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from valley_ray.cli.arguments import DTYPES
from valley_ray.cli.opening import quiet_libraries
from valley_ray.errors import CheckpointError


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Write a model for plain vLLM: its language model, and what makes prompts out of media."
    export = commands.add_parser(
        "export-vllm",
        help=about,
        description=f"{about} `vllm serve OUTPUT --enable-prompt-embeds` opens the folder; its README.md shows how to "
        "make embeddings of a video and ask. LoRA folders are merged.",
        allow_abbrev=False,
    )
    export.set_defaults(run=_run)
    export.add_argument("source", type=Path, metavar="MODEL", help="model folder to read")
    export.add_argument("output", type=Path, metavar="OUTPUT", help="new folder to write")
    export.add_argument(
        "--base", type=Path, metavar="FOLDER", help="model under a LoRA folder (default: as the folder says)"
    )
    export.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help="of the written weights: float32, float16, bfloat16 (default: as in the files)",
    )


def _run(options: argparse.Namespace) -> int:
    names = ("config.json", "adapter_config.json")
    if not any((options.source / name).is_file() for name in names):
        raise CheckpointError(f"{options.source} has no {' or '.join(names)}; check the path")
    if options.output.is_dir() and any(options.output.iterdir()):
        raise CheckpointError(f"{options.output} is not empty; name a new folder, so that nothing is overwritten")
    import torch

    from valley_ray.export import export_vllm

    quiet_libraries()
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    export_vllm(options.source, options.output, base=options.base, dtype=dtype)
    quoted = shlex.quote(str(options.output))
    print(f"wrote {options.output}; serve it: vllm serve {quoted} --enable-prompt-embeds; ask it: see its README.md")
    return 0
