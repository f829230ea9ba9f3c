"""jobs/finetune.py and jobs/pretrain.py: their command line, the nano world that their defaults need, their endings.

The work itself is `valley_ray.train.trainer.train`; `--check` is `valley_ray.train.report`.
"""

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from valley_ray.cli.arguments import HelpFormatter, Parser
from valley_ray.config import load_config
from valley_ray.errors import ConfigError
from valley_ray.program import run_program
from valley_ray.storage import storage_root
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.stage_config import StageConfig

NANO, QUICKSTART = "runs/nano", "runs/quickstart"
"""Where the default's clips and backbones are made, and where the quickstart makes its own, below the storage."""


def run_job(name: str, arguments: Sequence[str], *, about: str, default: Path, first_stage_alone: bool = False) -> int:
    """Run a training job; returns its exit status, as `run_program` has them.

    Args:
        about: what --help says above the options.
        default: configuration where the arguments name none.
        first_stage_alone: leave later stages of the configuration out, and refuse one that begins with a second.
    """

    def work() -> None:
        options = _parser(name, about).parse_intermixed_args(arguments)
        path, config = _config(options.words, default)
        _check_first_stage_was_run(config, path.parent)
        _run(_first_stage(config) if first_stage_alone else config, only_check=options.check)

    return run_program(name, work, stopped="stopped; start it again")


def _run(config: TrainConfig, *, only_check: bool) -> None:
    from valley_ray.train.check import check_run, pipeline_config

    pipeline_config(config)
    print(f"storage: {storage_root()}", flush=True)
    _make_nano(config)
    check_run(config)
    if only_check:
        from valley_ray.train.report import report_run

        print(report_run(config).text())
        return
    from valley_ray.session import connect, quiet_ray_data
    from valley_ray.train.trainer import train

    name = config.run_name or time.strftime("train-%Y%m%d-%H%M%S")
    print(f"run: {name} in {config.storage}; run_name={name} goes on with it", flush=True)
    connect()
    quiet_ray_data()
    result = train(config.model_copy(update={"run_name": name}))
    print(f'{result.text()}\ntry: valley-ray ask --model {result.model_folder} --video CLIP.mp4 "What is moving?"')


def _config(words: Sequence[str], default: Path) -> tuple[Path, TrainConfig]:
    overrides = [word for word in words if "=" in word]
    paths = [Path(word) for word in words if "=" not in word]
    if len(paths) > 1:
        raise ConfigError(f"expected one configuration file, got {' and '.join(map(str, paths))}; drop all but one")
    path = paths[0] if paths else default
    return path, load_config(TrainConfig, path, overrides).under(storage_root())


def _check_first_stage_was_run(config: TrainConfig, configs: Path) -> None:
    """Raise ConfigError, with the job to run, where the model is missing that another file of `configs` makes."""
    if (config.model / "config.json").is_file():
        return
    for path in sorted(configs.glob("*.yaml")):
        try:
            maker = load_config(TrainConfig, path).under(storage_root())
        except ConfigError:
            continue  # a configuration of something else
        if maker.output == config.model:
            job = "finetune" if len(maker.stages) > 1 or _language_parts(maker) else "pretrain"
            raise ConfigError(
                f"model={str(config.model)!r} is not there yet; python jobs/{job}.py {path} makes it, or name another"
            )


def _language_parts(config: TrainConfig) -> list[str]:
    """What the first stage trains of the language model."""
    from valley_ray.train.check import LANGUAGE_PARTS

    return sorted(config.stages[0].parts & LANGUAGE_PARTS)


def _first_stage(config: TrainConfig) -> TrainConfig:
    first = config.stages[0]
    if parts := _language_parts(config):
        raise ConfigError(
            f"stage {first.name} trains {', '.join(parts)}, which is for a second stage; run jobs/finetune.py with it"
        )
    return config.model_copy(update={"stages": (first,)})


def _make_nano(config: TrainConfig) -> None:
    """Whatever is missing of the nano world that `config` names, and nothing else.

    Raises:
        ConfigError: another model is named, and there is none.
    """
    from valley_ray.nano.backbones import NanoConfig
    from valley_ray.nano.make import (
        WorldConfig,
        make_clips,
        make_missing_backbones,
        take_over_backbones,
        take_over_clips,
    )
    from valley_ray.train.check import check_folders

    nano, quickstart = storage_root() / NANO, storage_root() / QUICKSTART
    wants_backbones = config.model == nano / "backbones"
    if not wants_backbones:
        check_folders(config)
    records = (config.data.pipeline or {}).get("records") or () if config.data.mode == "overlap" else ()
    wants_clips = any(Path(one) == nano / "data" / "train.json" for one in records)
    if not wants_backbones and not wants_clips:
        return

    if wants_clips:
        take_over_clips(quickstart / "data", nano / "data", WorldConfig(), say=_say)
        make_clips(nano / "data", WorldConfig(), say=_say)
    if wants_backbones:
        take_over_backbones(quickstart / "backbones", nano / "backbones", NanoConfig(), say=_say)
        make_missing_backbones(nano / "backbones", NanoConfig(), say=_say)


def _say(text: str) -> None:
    print(text, flush=True)


def _parser(name: str, about: str) -> Parser:
    parser = Parser(
        prog=f"jobs/{name}.py",
        description=about,
        epilog="\n\n".join(
            f"{title}:\n{_keys(model)}"
            for title, model in (
                ("settings, as KEY=value or in the file", TrainConfig),
                ("of the data (data.KEY=value)", DataConfig),
                ("of each stage (stages.0.KEY=value)", StageConfig),
            )
        ),
        formatter_class=_RawFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--check", action="store_true", help="say what would be trained, how much memory and how many steps; stop"
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="as above")
    return parser


class _RawFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of description and epilog."""


def _keys(model: type[BaseModel]) -> str:
    """One setting per line: name, default, and what its docstring begins with."""
    return "\n".join(
        textwrap.fill(
            f"{key:<22}  {' '.join((field.description or '').split())} [{_default(field)}]",
            width=118,
            initial_indent="  ",
            subsequent_indent=" " * 26,
        )
        for key, field in model.model_fields.items()
    )


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "docs/training.md" if field.default_factory is not None else str(field.default)
