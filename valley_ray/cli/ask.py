"""`valley-ray ask`: one question about a video, an image or neither; the answer is printed as it comes."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from valley_ray.cli.arguments import add_assistant, add_frames, add_words, read_params
from valley_ray.cli.opening import check_model, check_paths, check_question, open_assistant, policy_for, read_sampling
from valley_ray.errors import ConfigError

if TYPE_CHECKING:
    from valley_ray.assistant import Assistant


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Ask one question about a video, images or neither."
    ask = commands.add_parser("ask", help=about, description=about, allow_abbrev=False)
    ask.set_defaults(run=_run)
    ask.add_argument("question", help="what you want to know")
    add_assistant(ask)
    ask.add_argument(
        "--video",
        metavar="FILE",
        action="append",
        default=[],
        help="video file, folder of frames, data: URI or http(s) URL; repeatable",
    )
    ask.add_argument("--image", metavar="FILE", action="append", default=[], help="the same for an image; repeatable")
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of the text as it comes")
    add_frames(ask)
    add_words(ask)


def _run(options: argparse.Namespace) -> int:
    check_model(options.model)
    sampling = read_sampling(options)
    if sampling is not None and not options.video:
        raise ConfigError("--num-frames, --fps, --start and --end choose frames of a video; add --video FILE")
    locators = options.video + options.image
    check_paths(locators)
    check_question(options.question)
    question = {
        "question": options.question,
        "video": options.video,
        "image": options.image,
        "sampling": sampling,
        "params": read_params(options),
        "system_prompt": options.system_prompt,
        "stop": options.stop,
    }
    with open_assistant(options, policy=policy_for(locators)) as assistant:
        if options.json:
            _print_json(assistant, question)
        else:
            for delta in assistant.stream(**question):
                print(delta, end="", flush=True)
            print()
    return 0


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
