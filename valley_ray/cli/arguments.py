"""Options that several commands share, and how their values are read."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from valley_ray.errors import ConfigError

if TYPE_CHECKING:
    from valley_ray.engine.engine import SamplingParams

DEFAULT_MODEL = Path("models/nano")
DTYPES = ("float32", "float16", "bfloat16")


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with room for the longest option beside its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def add_argument(self, action: argparse.Action) -> None:
        """Measure an action; argparse forgets the indent of subcommands, and breaks the line of the longest ones."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ConfigError like any other; `command` of what was parsed is the parser that did."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(**options)
        self.set_defaults(command=self)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """argparse's, but options may stand between the `words` of a command: its own way knows no subcommands.

        Raises:
            ConfigError: an option is unknown, which alone is blamed whatever follows it, or a word is one too many.
        """
        options, rest = self.parse_known_args(args, namespace)
        command: Parser = options.command
        if unknown := [word for word in rest if word.startswith("-")]:
            command.error(f"unrecognized arguments: {' '.join(unknown)}{command._did_you_mean(unknown[0])}")
        if rest and "words" not in options:
            command.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            options.words = [*options.words, *rest]
        return options

    def _did_you_mean(self, option: str) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        nearest = difflib.get_close_matches(option.partition("=")[0], known, n=1)
        return f" (did you mean {nearest[0]}?)" if nearest else ""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's reason and where to read more."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def add_assistant(command: argparse.ArgumentParser) -> None:
    """--model and what is asked of it: --base, --device, --dtype, --system-prompt, --stop, --decoder and switches."""
    command.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="model folder (default: %(default)s)"
    )
    command.add_argument(
        "--base", type=Path, metavar="FOLDER", help="model under a LoRA folder (default: as the folder says)"
    )
    command.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help="of the weights: float32, float16, bfloat16 (default: float32 on a CPU, else as in the files)",
    )
    command.add_argument("--system-prompt", metavar="TEXT", help="instead of the model's own")
    command.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="an answer ends where it writes this; repeatable"
    )
    upstream = command.add_argument_group("switches to what the original does (docs/upstream.md)")
    upstream.add_argument(
        "--decoder",
        choices=("pyav", "decord"),
        default="pyav",
        metavar="NAME",
        help="video reader: pyav, which is exact (default), or decord for the original's frames with its faults",
    )
    upstream.add_argument(
        "--prompt-style", metavar="STYLE", help="valley, upstream-train, upstream-build-inputs or upstream-serve"
    )
    upstream.add_argument("--splice", metavar="RULE", help="strict, upstream or upstream-serve")
    upstream.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="another setting of processor_config.json, for example stop_skips_first_token=true; repeatable",
    )


def add_frames(command: argparse.ArgumentParser) -> None:
    """--num-frames, --fps, --start and --end."""
    frames = command.add_argument_group("frames of the video (default: as the model was trained)")
    how_many = frames.add_mutually_exclusive_group()
    how_many.add_argument("--num-frames", type=int, metavar="N", help="this many, spread evenly")
    how_many.add_argument("--fps", type=float, metavar="RATE", help="this many per second")
    frames.add_argument("--start", type=float, metavar="SECONDS", help="look from here on")
    frames.add_argument("--end", type=float, metavar="SECONDS", help="look no further than here")


def add_words(command: argparse.ArgumentParser) -> None:
    """--max-tokens, --temperature, --top-p and --seed."""
    words = command.add_argument_group("words of the answer")
    words.add_argument("--max-tokens", type=number(int, least=1), metavar="N", help="at most (default: 128)")
    words.add_argument(
        "--temperature", type=number(float, least=0), default=0.0, metavar="T", help="0: the likeliest (default)"
    )
    words.add_argument(
        "--top-p", type=number(float, over=0, most=1), default=1.0, metavar="P", help="draw from this share of mass"
    )
    words.add_argument("--seed", type=int, default=0, help="the same seed draws the same answer (default: 0)")


def read_params(options: argparse.Namespace) -> "SamplingParams | None":
    """What the options of `add_words` say; None where they say nothing: the assistant then lowers its limit to fit."""
    from valley_ray.engine.engine import SamplingParams

    params = SamplingParams(options.max_tokens or 128, options.temperature, options.top_p, seed=options.seed)
    return None if options.max_tokens is None and params == SamplingParams() else params


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of ProcessorConfig that --prompt-style and --set name."""
    from valley_ray.config import apply_overrides

    settings: dict[str, Any] = {}
    apply_overrides(settings, options.set)
    return settings if options.prompt_style is None else {**settings, "prompt_style": options.prompt_style}


def number(
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
