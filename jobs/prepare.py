"""Turn videos into training shards, every row accounted for. Run it again to go on, or after new clips have come.

python jobs/prepare.py                                      generated clips, as jobs/configs/prepare.yaml says
python jobs/prepare.py --input FILE_OR_FOLDER [--input ...] [--media-root DIR] --output DIR [key=value ...]
python jobs/prepare.py CONFIG.yaml [key=value ...]
"""

import argparse
import sys
from pathlib import Path

from valley_ray.config import COMMAND_LINE, apply_overrides, read_yaml, validate_config
from valley_ray.data.check import check_prepare
from valley_ray.data.config import PrepareConfig
from valley_ray.errors import ValleyError
from valley_ray.program import run_program
from valley_ray.session import connect, quiet_ray_data
from valley_ray.storage import storage_root


def main(arguments: list[str]) -> int:
    """Exit status, as `run_program` has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input", action="append", default=[], metavar="FILE_OR_FOLDER", help="records or media")
    parser.add_argument("--media-root", metavar="DIR", help="folder of the media that records name; else theirs")
    parser.add_argument("--output", metavar="DIR", help="folder that is written, or added to")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")

    def work() -> None:
        config = _config(parser.parse_intermixed_args(arguments)).under(storage_root())
        check_prepare(config)
        connect()
        quiet_ray_data()
        from valley_ray.data.prepare import prepare

        print(prepare(config).text(config.output))

    return run_program("prepare", work)


def _config(given: argparse.Namespace) -> PrepareConfig:
    if len(paths := [Path(word) for word in given.words if "=" not in word]) > 1:
        raise ValleyError(f"expected one configuration file, got {' and '.join(map(str, paths))}; drop one")
    if not paths and not given.input:
        from valley_ray.nano.make import SMALL_WORLD, make_clips

        make_clips(storage_root() / "runs/prepare/clips", SMALL_WORLD, say=lambda text: print(text, flush=True))
        paths = [Path(__file__).parent / "configs" / "prepare.yaml"]
    named = {"sources": [{"path": at} for at in given.input], "media_root": given.media_root, "output": given.output}
    values = (read_yaml(paths[0]) if paths else {}) | {name: value for name, value in named.items() if value}
    apply_overrides(values, overrides := [word for word in given.words if "=" in word])
    if "output" not in values:
        raise ValleyError("nowhere to write: give --output DIR")
    return validate_config(PrepareConfig, values, source=str(paths[0]) if paths else COMMAND_LINE, overrides=overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
