"""Turn videos into training shards, every row accounted for. Run it again to go on, or after new clips have come.

python jobs/prepare.py                                      generated clips, as jobs/configs/prepare.yaml says
python jobs/prepare.py --input FILE_OR_FOLDER [--input ...] --output DIR [key=value ...]
python jobs/prepare.py CONFIG.yaml [key=value ...]
"""

import argparse
import sys
from pathlib import Path

from valley_ray.config import apply_overrides, read_yaml, validate_config
from valley_ray.data.config import PrepareConfig
from valley_ray.errors import ValleyError
from valley_ray.session import connect, quiet_ray_data
from valley_ray.storage import storage_root

GENERATED = Path(__file__).parent / "configs" / "prepare.yaml"


def main(arguments: list[str]) -> int:
    """Exit status 0, 2 with one line on stderr for a user's mistake, or 130 with one line for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input", action="append", default=[], metavar="FILE_OR_FOLDER", help="records or media")
    parser.add_argument("--output", metavar="DIR", help="folder that is written, or added to")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    given = parser.parse_intermixed_args(arguments)
    try:
        config = _config(given).under(storage_root())
        connect()
        quiet_ray_data()
        from valley_ray.data.prepare import prepare

        print(prepare(config).text(config.output))
    except ValleyError as error:
        print(f"prepare: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: stopped; run it again to go on", file=sys.stderr)
        return 130
    return 0


def _config(given: argparse.Namespace) -> PrepareConfig:
    if len(paths := [Path(word) for word in given.words if "=" not in word]) > 1:
        raise ValleyError(f"expected one configuration file, got {' and '.join(map(str, paths))}; drop one")
    if not paths and not given.input:
        from valley_ray.nano.make import WorldConfig, make_clips

        world = WorldConfig(num_train=96, num_held_out=32, num_train_harder=24, num_held_out_harder=8)
        make_clips(storage_root() / "runs/prepare/clips", world, say=lambda text: print(text, flush=True))
        paths = [GENERATED]
    options = {"sources": [{"path": path} for path in given.input], "output": given.output}
    values = (read_yaml(paths[0]) if paths else {}) | {name: value for name, value in options.items() if value}
    apply_overrides(values, [word for word in given.words if "=" in word])
    return validate_config(PrepareConfig, values, source=str(paths[0]) if paths else "the command line")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
