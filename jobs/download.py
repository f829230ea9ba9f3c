"""Fetch lists of videos: python jobs/download.py [CONFIG.yaml] [key=value ...]. Default: jobs/configs/download.yaml"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from valley_ray.config import load_config
from valley_ray.data.download.config import DownloadConfig
from valley_ray.errors import ValleyError
from valley_ray.program import run_program
from valley_ray.session import connect
from valley_ray.storage import storage_root

DEFAULT = Path(__file__).parent / "configs" / "download.yaml"


def main(arguments: list[str]) -> int:
    """Exit status, as `run_program` has them; the summary counts failed rows."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    return run_program(
        "download", lambda: _download(arguments), stopped="stopped; what has ended is recorded, start again to go on"
    )


def _download(arguments: list[str]) -> None:
    overrides, paths = [one for one in arguments if "=" in one], [Path(one) for one in arguments if "=" not in one]
    if len(paths) > 1:
        raise ValleyError(f"expected one configuration file, got {', '.join(map(str, paths))}; drop all but one")
    config = load_config(DownloadConfig, paths[0] if paths else DEFAULT, overrides).under(storage_root())
    print(f"media: {config.media_root}", flush=True)
    from valley_ray.data.download.run import run_downloads

    serving: AbstractContextManager[None] = nullcontext()
    if config.sources == load_config(DownloadConfig, DEFAULT).under(storage_root()).sources:
        serving = _own_clips(config.sources[0].path)
        config = config.model_copy(update={"allow_private_addresses": True})
    with serving:
        summary = run_downloads(config, on_progress=lambda line: print(line, flush=True))
    for name, text in summary.examples.items():
        print(f"failed  {summary.by_error_class[name]} x {name}, for example {text}")
    print(f"ledger  {summary.ledger}\nclips   {summary.clips}\n{json.dumps(asdict(summary))}")


def _own_clips(list_file: Path) -> AbstractContextManager[None]:
    """What the default configuration downloads, served while the block runs, to the nodes of a cluster too."""
    from ray.util import get_node_ip_address

    from valley_ray.nano.site import serve_scenes

    connect(include_dashboard=False)
    return serve_scenes(list_file, host=get_node_ip_address())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
