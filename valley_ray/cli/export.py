"""`valley-ray export-vllm`: a model folder → a plain language model for vLLM, and what makes its prompts."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from valley_ray.cli.folders import add_dtype, add_source_and_output, check_input, check_output, dtype_of
from valley_ray.cli.opening import quiet_libraries


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
    add_source_and_output(export)
    export.add_argument(
        "--base", type=Path, metavar="FOLDER", help="model under a LoRA folder (default: as the folder says)"
    )
    add_dtype(export)


def _run(options: argparse.Namespace) -> int:
    check_input(options.source, "config.json", "adapter_config.json")
    check_output(options.output)
    from valley_ray.export import export_vllm

    quiet_libraries()
    export_vllm(options.source, options.output, base=options.base, dtype=dtype_of(options))
    quoted = shlex.quote(str(options.output))
    print(f"wrote {options.output}; serve it: vllm serve {quoted} --enable-prompt-embeds; ask it: see its README.md")
    return 0
