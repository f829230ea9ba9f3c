"""valley-ray: the command line. Arguments in, answers on stdout, one-line errors on stderr.

Every ValleyError is one line and exit code 2. Each command imports what it needs when it runs, so that `--help` and
mistakes that can be seen early cost no import of torch or Ray. Knows no Ray itself: `valley_ray.serve` does.
"""

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import valley_ray
from valley_ray.errors import CheckpointError, ConfigError, ConversationError, ValleyError

if TYPE_CHECKING:
    from valley_ray.assistant import Assistant
    from valley_ray.media.sampling import FrameSampling
    from valley_ray.serve.app import ServedApp

DEFAULT_MODEL = Path("models/nano")
USER_ERROR = 2
INTERRUPTED, PIPE_CLOSED = 130, 141
"""As a shell reports programs that end by SIGINT and SIGPIPE."""

_SMALL_MODEL = 50_000_000
"""Parameters. Below it a second torch thread gains little on an idle CPU, and on a busy one each of the many small
steps waits for both threads: measured 25 times slower on two cores with two other processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
        sys.stdout.flush()
    except ValleyError as error:
        print(f"valley-ray: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (`| head`). Python flushes stdout once more at its end: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="valley-ray", description="Valley, the video assistant, on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"valley-ray {valley_ray.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_ask(commands)
    _add_serve(commands)
    return parser


def _add_ask(commands: Any) -> None:
    about = "Ask one question about a video, an image or neither."
    ask = commands.add_parser("ask", help=about, description=about, allow_abbrev=False)
    ask.set_defaults(run=_ask)
    ask.add_argument("question", help="what you want to know")
    ask.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model folder (default: %(default)s)")
    ask.add_argument("--video", metavar="FILE", help="video file, folder of frames, data: URI or http(s) URL")
    ask.add_argument("--image", metavar="FILE", help="image file, data: URI or http(s) URL")
    ask.add_argument("--system-prompt", metavar="TEXT", help="instead of the model's own")
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of the text as it comes")
    frames = ask.add_argument_group("frames of the video (default: as the model was trained)")
    how_many = frames.add_mutually_exclusive_group()
    how_many.add_argument("--num-frames", type=int, metavar="N", help="this many, spread evenly")
    how_many.add_argument("--fps", type=float, metavar="RATE", help="this many per second")
    frames.add_argument("--start", type=float, metavar="SECONDS", help="look from here on")
    frames.add_argument("--end", type=float, metavar="SECONDS", help="look no further than here")
    words = ask.add_argument_group("words of the answer")
    words.add_argument("--max-tokens", type=_number(int, least=1), metavar="N", help="at most (default: 128)")
    words.add_argument(
        "--temperature", type=_number(float, least=0), default=0.0, metavar="T", help="0: the likeliest (default)"
    )
    words.add_argument(
        "--top-p", type=_number(float, over=0, most=1), default=1.0, metavar="P", help="draw from this share of mass"
    )
    words.add_argument("--seed", type=int, default=0, help="the same seed draws the same answer (default: 0)")


def _add_serve(commands: Any) -> None:
    about = "Serve a model over HTTP (OpenAI chat API) until Ctrl-C."
    serve = commands.add_parser(
        "serve",
        help=about,
        description=f"{about} Starts a Ray of its own, or joins the one that RAY_ADDRESS names.",
        usage="valley-ray serve [-h] [--host HOST] [--port PORT] [CONFIG.yaml] [KEY=VALUE ...]",
        allow_abbrev=False,
    )
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml KEY=VALUE",
        help="a Serve YAML such as serve_configs/valley.yaml (default: models/nano), and changes to its args, "
        "for example model=models/mine decoder.num_replicas=2",
    )
    serve.add_argument("--host", help="address to listen on (default: the file's, or 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for any (default: the file's, or 8000)")


def _ask(options: argparse.Namespace) -> int:
    _check_model(options.model)
    sampling = _sampling(options)
    _check_paths([options.video, options.image])
    _check_question(options.question)
    from valley_ray.engine.engine import SamplingParams

    params = SamplingParams(options.max_tokens or 128, options.temperature, options.top_p, seed=options.seed)
    question = {
        "question": options.question,
        "video": options.video,
        "image": options.image,
        "sampling": sampling,
        # Without a wish the assistant lowers its limit to what fits.
        "params": None if options.max_tokens is None and params == SamplingParams() else params,
        "system_prompt": options.system_prompt,
    }
    with _quick_start():
        assistant = _open_assistant(options)
    with assistant:
        if options.json:
            _print_json(assistant, question)
        else:
            for delta in assistant.stream(**question):
                print(delta, end="", flush=True)
            print()
    return 0


def _serve(options: argparse.Namespace) -> int:
    from valley_ray.config import validate_config
    from valley_ray.serve.config import HttpOptions, read_serve_file

    words: list[str] = options.words
    path = Path(words.pop(0)) if words and "=" not in words[0] else None
    config, http = read_serve_file(path, words)
    wishes = {"host": options.host, "port": options.port}
    given = {key: value for key, value in wishes.items() if value is not None}
    http = validate_config(HttpOptions, {**http.model_dump(), **given}, source="the command line")
    _check_model(config.model)
    from valley_ray.serve.standalone import run_standalone

    try:
        with run_standalone(config, http) as served:
            _print_welcome(served, config.allow_roots)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("valley-ray: stopped", file=sys.stderr)
    return 0


def _check_model(folder: Path) -> None:
    """Said before anything heavy is imported; `from_pretrained` checks all the rest."""
    if (folder / "config.json").is_file():
        return
    if folder == DEFAULT_MODEL:
        raise CheckpointError(f"no model at {folder}: run `make quickstart`, which makes it, or name another folder")
    raise CheckpointError(f"no model at {folder} (a model folder holds a config.json); check the path")


def _check_question(question: str) -> None:
    if not question.strip():
        raise ConversationError("the question is empty; ask something, for example 'What is moving?'")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ConversationError("the question is not valid UTF-8; check the terminal's encoding") from error


def _check_paths(locators: Sequence[str | None]) -> None:
    """Raise for a missing file at once rather than after the model was opened; URLs and data: URIs can wait."""
    from valley_ray.fetch import FetchPolicy, fetch, locator_kind

    for locator in locators:
        if locator is not None and locator_kind(locator) in ("path", "file"):
            fetch(locator, FetchPolicy())


def _sampling(options: argparse.Namespace) -> "FrameSampling | None":
    """What the options say, over the model folder's own; None where they say nothing."""
    wishes = {"num_frames": options.num_frames, "fps": options.fps, "start_s": options.start, "end_s": options.end}
    given = {key: value for key, value in wishes.items() if value is not None}
    if not given:
        return None
    if options.video is None:
        raise ConfigError("--num-frames, --fps, --start and --end choose frames of a video; add --video FILE")
    from valley_ray.config import validate_config
    from valley_ray.media.sampling import FrameSampling
    from valley_ray.processor import read_processor_config

    own = read_processor_config(options.model).sampling.model_dump()
    if "num_frames" in given or "fps" in given:
        own.update(num_frames=None, fps=None)
    return validate_config(FrameSampling, {**own, **given}, source="the command line")


@contextmanager
def _quick_start() -> Iterator[None]:
    """Import and build without garbage collection, which would look at all of torch's objects again and again.

    None of them becomes garbage, so none is looked at later either: 3.0 s instead of 5.0 s for a whole `ask`.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _open_assistant(options: argparse.Namespace) -> "Assistant":
    import torch
    from transformers.utils import logging as transformers_logging

    from valley_ray.assistant import Assistant
    from valley_ray.fetch import FetchPolicy

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Whoever types a URL means its host.
    policy = FetchPolicy(allow_hosts=_hosts([options.video, options.image]))
    assistant = Assistant.from_pretrained(options.model, num_slots=1, policy=policy)
    if assistant.model.num_parameters() < _SMALL_MODEL:
        torch.set_num_threads(1)
    return assistant


def _hosts(locators: Sequence[str | None]) -> tuple[str, ...]:
    from urllib.parse import urlsplit

    from valley_ray.fetch import locator_kind

    urls = [locator for locator in locators if locator is not None and locator_kind(locator) == "http"]
    return tuple(urlsplit(url).hostname or "" for url in urls)


def _print_json(assistant: "Assistant", question: dict[str, Any]) -> None:
    start = time.perf_counter()
    answer = assistant.ask(**question)
    shown = {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_tokens": len(answer.token_ids),
        "seconds": round(time.perf_counter() - start, 3),
    }
    print(json.dumps(shown, ensure_ascii=False))


def _print_welcome(served: "ServedApp", allow_roots: Sequence[Path]) -> None:
    roots = ", ".join(map(str, allow_roots)) or "none; allow a folder with 'allow_roots=[FOLDER]'"
    video = {"type": "video_url", "video_url": {"url": f"{(*allow_roots, Path('FOLDER'))[0].absolute()}/clip.mp4"}}
    content = [video, {"type": "text", "text": "What is moving?"}]
    body = {"model": served.model_name, "messages": [{"role": "user", "content": content}]}
    print(f"valley-ray: {served.model_name} answers at {served.url} (Ctrl-C ends it)")
    print(f"Files that requests may name by path: {roots}. Other files go as data: URIs.")
    print(f"curl {served.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    sys.stdout.flush()


def _number(
    kind: type[int] | type[float], *, least: float | None = None, over: float | None = None, most: float | None = None
) -> Callable[[str], float]:
    """An argparse type: a finite number in a range."""
    limits = [f"at least {least}"] * (least is not None) + [f"over {over}"] * (over is not None)
    limits += [f"at most {most}"] * (most is not None)

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        fits = (least is None or value >= least) and (over is None or value > over) and (most is None or value <= most)
        if not fits or abs(value) == float("inf"):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {name} {' and '.join(limits)}, got {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
