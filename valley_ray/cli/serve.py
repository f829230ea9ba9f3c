"""`valley-ray serve`: a model over HTTP, on a Ray of its own, until Ctrl-C."""

import argparse
import gc
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valley_ray.cli.opening import check_model

if TYPE_CHECKING:
    from valley_ray.serve.app import ServedApp
    from valley_ray.serve.config import ServeConfig


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Serve a model over HTTP (OpenAI chat API) until Ctrl-C."
    serve = commands.add_parser(
        "serve",
        help=about,
        description=f"{about} Starts a Ray of its own, or joins the one that RAY_ADDRESS names.",
        usage="valley-ray serve [-h] [--host HOST] [--port PORT] [CONFIG.yaml] [KEY=VALUE ...]",
        allow_abbrev=False,
    )
    serve.set_defaults(run=_run)
    serve.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml KEY=VALUE",
        help="a Serve YAML such as serve_configs/valley.yaml (default: models/nano), and changes to its args, "
        "for example model=models/mine decoder.num_replicas=2",
    )
    serve.add_argument("--host", help="address to listen on (default: the file's, or 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for any (default: the file's, or 8000)")


def _run(options: argparse.Namespace) -> int:
    from valley_ray.config import validate_config
    from valley_ray.serve.config import HttpOptions, read_serve_file

    words: list[str] = options.words
    path = Path(words.pop(0)) if words and "=" not in words[0] else None
    config, http = read_serve_file(path, words)
    wishes = {"host": options.host, "port": options.port}
    given = {key: value for key, value in wishes.items() if value is not None}
    http = validate_config(HttpOptions, {**http.model_dump(), **given}, source="the command line")
    check_model(config.model)
    from valley_ray.serve.standalone import run_standalone

    def say_that_it_starts() -> None:
        print(f"valley-ray: {config.model} is being opened, half a minute on a laptop", file=sys.stderr, flush=True)

    try:
        with run_standalone(config, http, on_start=say_that_it_starts) as served:
            _print_welcome(served, config)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("valley-ray: stopped", file=sys.stderr)
    # At its end Python searches all that was imported for cycles: 1.5 s on a laptop, for memory that goes anyway.
    gc.freeze()
    return 0


def _print_welcome(served: "ServedApp", config: "ServeConfig") -> None:
    roots = ", ".join(map(str, config.allow_roots)) or "none; allow a folder with 'allow_roots=[FOLDER]'"
    folder = config.allow_roots[0].absolute() if config.allow_roots else Path("/FOLDER")
    content = [
        {"type": "video_url", "video_url": {"url": f"{folder}/FILE.mp4"}},
        {"type": "text", "text": "What is moving?"},
    ]
    body = {"model": served.model_name, "messages": [{"role": "user", "content": content}]}
    print(f"valley-ray: {served.model_name} answers at {served.url} (Ctrl-C ends it)")
    if config.adapters:
        print(f"Its adapters are asked by the model names {', '.join(map(config.name_under, config.adapters))}.")
    print(f"Files that requests may name by path: {roots}. Other files are uploaded (/v1/files) or sent as data: URIs.")
    print(f"curl {served.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    sys.stdout.flush()
