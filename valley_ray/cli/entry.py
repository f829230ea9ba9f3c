"""The program: one parser over all commands, and what each kind of ending means to the shell."""

import os
import sys
from collections.abc import Sequence

import valley_ray
from valley_ray.cli import ask, chat, convert_config, doctor, export, serve, weights
from valley_ray.cli.arguments import Parser
from valley_ray.errors import ValleyError
from valley_ray.program import INTERRUPTED, USER_ERROR

PIPE_CLOSED = 141
"""As a shell reports programs that end by SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""
    try:
        options = build_parser().parse_args(argv)
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


def build_parser() -> Parser:
    """The parser of every command; each sets `run`, a function from the parsed options to the exit code."""
    parser = Parser(prog="valley-ray", description="Valley, the video assistant, on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"valley-ray {valley_ray.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (ask, chat, serve, weights, export, convert_config, doctor):
        command.add_to(commands)
    return parser
