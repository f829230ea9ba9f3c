"""`valley-ray chat`: a conversation in the terminal. Each question goes to the model with all that was said before.

A turn counts only once it has an answer, so a mistake ends neither the chat nor its history. Lines come from a
terminal or a pipe.
"""

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from valley_ray.cli.arguments import HelpFormatter, add_assistant, add_frames, add_words, read_params
from valley_ray.cli.opening import (
    check_model,
    check_paths,
    check_question,
    open_assistant,
    policy_for,
    read_sampling,
)
from valley_ray.errors import ConversationError, FetchError, MediaError, PromptTooLongError, SamplingError, ValleyError

Message = dict[str, Any]
"""An OpenAI-style chat message."""

HELP = """\
/video FILE   show a video with your next question (a folder of frames or a URL works too)
/image FILE   show an image with it
/reset        forget everything and start over
/help         this list
/quit         leave, as Ctrl-D does
Ctrl-C ends an answer. Anything else is a question."""

PROMPT = "> "


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Talk about videos and images in the terminal."
    chat = commands.add_parser(
        "chat",
        help=about,
        description=about,
        epilog=f"Inside it:\n{HELP}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    chat.set_defaults(run=_run)
    add_assistant(chat)
    for kind in ("video", "image"):
        about = f"begin with this {kind}, as /{kind} does; repeatable"
        chat.add_argument(f"--{kind}", metavar="FILE", action="append", default=[], help=about)
    add_frames(chat)
    add_words(chat)


class _HelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of HELP."""


class Chat:
    """What was said so far and what waits to be shown; knows no terminal."""

    def __init__(self, stream: Callable[[list[Message]], Generator[str]], *, system_prompt: str | None = None) -> None:
        """`stream` turns messages into the deltas of an answer; errors come before the first delta."""
        self._stream = stream
        self._system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self.messages: list[Message] = []
        """Answered turns: user, assistant, user, ..."""
        self.pending: list[Message] = []
        """Media parts that go with the next question."""

    def reset(self) -> None:
        """Forget all turns and what was to be shown."""
        self.messages, self.pending = [], []

    def show(self, kind: str, locator: str) -> None:
        """Add a video or image to the next question."""
        self.pending.append({"type": f"{kind}_url", f"{kind}_url": {"url": locator}})

    def ask(self, question: str, say: Callable[[str], None]) -> bool:
        """Answer in full or until KeyboardInterrupt; what was said until then stays. False where it was interrupted.

        Raises:
            ValleyError: there is no answer. History stays as it was; media that cannot be read are dropped.
        """
        content = [*self.pending, {"type": "text", "text": question}] if self.pending else question
        user: Message = {"role": "user", "content": content}
        said: list[str] = []
        finished = False
        try:
            check_question(question)
            with closing(self._stream([*self._system, *self.messages, user])) as deltas:
                for delta in deltas:
                    said.append(delta)
                    say(delta)
            finished = True
        except (MediaError, FetchError, SamplingError):
            self.pending = []
            raise
        except KeyboardInterrupt:
            pass
        if said or finished:
            self.messages += [user, {"role": "assistant", "content": _without_marks("".join(said))}]
            self.pending = []
        return finished


def _without_marks(text: str) -> str:
    """A model may write "<video>" or "<im_patch>"; sent back like that it would stand for media that nobody gave."""
    from valley_ray.chat.conversation import MEDIA_MARK
    from valley_ray.chat.tokens import ADDED_TOKENS

    text = MEDIA_MARK.sub(lambda mark: mark[0].replace("<", "< "), text)
    for token in ADDED_TOKENS:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _run(options: argparse.Namespace) -> int:
    check_model(options.model)
    sampling = read_sampling(options)
    given = [("video", video) for video in options.video] + [("image", image) for image in options.image]
    check_paths([locator for _, locator in given])
    params = read_params(options)
    with ExitStack() as stack:
        assistant = stack.enter_context(open_assistant(options, policy=policy_for([])))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="valley-chat-")))

        def stream(messages: list[Message]) -> Generator[str]:
            yield from assistant.stream(messages, sampling=sampling, params=params, stop=options.stop)

        chat = Chat(stream, system_prompt=options.system_prompt)
        for kind, locator in given:
            chat.show(kind, kept_locator(locator, folder))
        _talk(chat, folder)
    return 0


def _talk(chat: Chat, folder: Path) -> None:
    """Lines in, answers out, until the lines end or /quit."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # input() then has history and line editing

        print("Ask, or /help. Ctrl-D leaves.")
    while (line := _next_line()) is not None:
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "/quit":
            return
        try:
            if word.startswith("/"):
                _obey(chat, word, rest.strip(), folder)
            else:
                _answer(chat, line.strip())
        except ValleyError as error:
            hint = " (/reset starts over)" if isinstance(error, PromptTooLongError) and chat.messages else ""
            print(f"valley-ray: error: {' '.join(str(error).split())}{hint}", file=sys.stderr, flush=True)


def _next_line() -> str | None:
    """The next line; None at the end of them. Ctrl-C empties the line, as in a shell."""
    while True:
        try:
            return input(PROMPT if sys.stdin.isatty() else "")
        except UnicodeDecodeError as error:
            print(f"valley-ray: error: a line is not valid UTF-8 ({error.reason}); leaving", file=sys.stderr)
            return None
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", flush=True)


def _answer(chat: Chat, question: str) -> None:
    finished = chat.ask(question, lambda delta: print(delta, end="", flush=True))
    print("" if finished else " (ended)", flush=True)


def _obey(chat: Chat, word: str, rest: str, folder: Path) -> None:
    if word == "/help":
        print(HELP, flush=True)
    elif word == "/reset":
        chat.reset()
        print("Forgotten. The next question starts over.", flush=True)
    elif word in ("/video", "/image"):
        if not rest:
            raise ConversationError(f"{word} needs a file, for example {word} clip.mp4")
        chat.show(word[1:], kept_locator(rest, folder))
        print(f"Your next question is about {rest}.", flush=True)
    else:
        raise ConversationError(f"there is no command {word}; /help lists them")


def kept_locator(locator: str, folder: Path) -> str:
    """A path as it is, checked; what a URL leads to in `folder`, since every later turn looks at it again."""
    from valley_ray.fetch import fetch, locator_kind

    if locator_kind(locator) != "http":
        check_paths([locator])
        return locator
    fetched = fetch(locator, policy_for([locator]))
    assert isinstance(fetched.source, bytes), "a download gives bytes"
    path = folder / str(len(list(folder.iterdir()))) / (Path(fetched.name).name or "download")
    path.parent.mkdir()
    path.write_bytes(fetched.source)
    return str(path)
