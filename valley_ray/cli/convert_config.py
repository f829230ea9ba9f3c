"""`valley-ray convert-config`: the original's experiment YAML in, a training configuration of ours out."""

import argparse
from pathlib import Path
from typing import Any

from valley_ray.cli.arguments import number
from valley_ray.errors import ConfigError


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Rewrite an experiment's YAML of the original as a configuration of ours."
    command = commands.add_parser(
        "convert-config",
        help=about,
        description=f"{about} Says what was changed, what was ignored, and why.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_run)
    command.add_argument("source", type=Path, metavar="UPSTREAM.yaml", help="valley/configs/experiment/*.yaml")
    command.add_argument("--output", type=Path, required=True, metavar="OURS.yaml", help="new file to write")
    command.add_argument(
        "--num-workers",
        type=number(int, least=1),
        metavar="N",
        help="GPUs that the file was written for: it counts batches per GPU (default: 8, the original's)",
    )


def _run(options: argparse.Namespace) -> int:
    import yaml

    from valley_ray.config import read_yaml
    from valley_ray.train.upstream_config import NUM_WORKERS, convert_upstream

    if options.output.exists():
        raise ConfigError(f"{options.output} is there already; name a new file, so that nothing is overwritten")
    converted = convert_upstream(
        read_yaml(options.source), source=options.source, num_workers=options.num_workers or NUM_WORKERS
    )
    text = yaml.safe_dump(converted.values, sort_keys=False, allow_unicode=True, width=120)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(f"# Converted from the original's {options.source.name}.\n{text}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {options.output}: {error.strerror}; name another file") from error
    print(converted.text())
    print(f"wrote {options.output}; look it through, then: python jobs/finetune.py {options.output} --check")
    return 0
