"""Train Valley's stages on Ray: python jobs/finetune.py [CONFIG.yaml] [key=value ...]

Default: the nano model, as jobs/configs/nano.yaml says. Every setting is described in valley_ray/train/config.py.
"""

import sys
from pathlib import Path

from valley_ray.config import load_config
from valley_ray.errors import ConfigError, ValleyError
from valley_ray.session import connect, quiet_ray_data
from valley_ray.storage import storage_root
from valley_ray.train.config import TrainConfig

NANO = Path(__file__).parent / "configs" / "nano.yaml"


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 with one line on stderr for a user's mistake."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    overrides = [argument for argument in arguments if "=" in argument]
    paths = [Path(argument) for argument in arguments if "=" not in argument]
    try:
        if len(paths) > 1:
            raise ValleyError(f"expected one configuration file, got {', '.join(map(str, paths))}; drop all but one")
        config = load_config(TrainConfig, paths[0] if paths else NANO, overrides).under(storage_root())
        from valley_ray.train.trainer import pipeline_config, train

        pipeline_config(config)
        print(f"storage: {storage_root()}", flush=True)
        if not paths:
            _make_nano(config)
        connect()
        quiet_ray_data()
        result = train(config)
    except ValleyError as error:
        print(f"finetune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(
        f"model folder  {result.model_folder}\nmetrics       {result.metrics_path}\nloss curve    {result.curve_path}"
    )
    print(f'try: valley-ray ask --model {result.model_folder} --video CLIP.mp4 "What is moving?"')
    return 0


def _make_nano(config: TrainConfig) -> None:
    """Clips and backbones of the default configuration, where they are missing; ConfigError for a wrong model."""
    from valley_ray.nano.backbones import NanoConfig
    from valley_ray.nano.make import WorldConfig, make_world

    nano = load_config(TrainConfig, NANO).under(storage_root())
    if config.model != nano.model and not (config.model / "config.json").is_file():
        raise ConfigError(f"model={str(config.model)!r} is no model folder (no config.json in it); check the path")
    make_world(nano.model.parent, WorldConfig(), NanoConfig(), say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
