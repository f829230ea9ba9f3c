"""`valley-ray chat`: a conversation over lines of a pipe or a terminal; mistakes and Ctrl-C cost one turn at most."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from clips import write_clip
from PIL import Image

from valley_ray.assistant import Assistant
from valley_ray.chat.tokens import ADDED_TOKENS
from valley_ray.cli.chat import Chat, Message, kept_locator
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import CorruptMediaError, PromptTooLongError

QUESTION = "What is moving?"
COMMAND = [sys.executable, "-m", "valley_ray.cli", "chat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "a clip.mp4")


def talk(*lines: object, options: tuple[object, ...]) -> "subprocess.CompletedProcess[str]":
    words = "".join(f"{line}\n" for line in lines)
    command = [*COMMAND, *map(str, options)]
    return subprocess.run(command, input=words, capture_output=True, text=True, timeout=120, check=False)


class Model:
    """Answers by number and remembers what it was asked; raises what it is told to."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.error: BaseException | None = None
        self.error_after: int = 0

    def stream(self, messages: list[Message]) -> Generator[str]:
        self.asked.append(messages)
        for index, delta in enumerate((f"answer {len(self.asked)}", " and more")):
            if self.error is not None and index == self.error_after:
                error, self.error = self.error, None
                raise error
            yield delta


def test_answers_equal_the_assistants_with_the_whole_history(tiny_valley: Path, clip: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.linear_gradient("L").save(image)
    lines = ["yes no", f"/video {clip}", QUESTION, "Which colour?", "/reset", f"/image {image}", "Describe the clip"]
    shown = talk(*lines, options=("--model", tiny_valley, "--max-tokens", 8))
    assert (shown.returncode, shown.stderr) == (0, "")
    params = SamplingParams(max_tokens=8)
    video_part = {"type": "video_url", "video_url": {"url": str(clip)}}
    image_part = {"type": "image_url", "image_url": {"url": str(image)}}
    history: list[dict[str, Any]] = []
    answers = []
    with Assistant.from_pretrained(tiny_valley) as assistant:
        for content in ("yes no", [video_part, {"type": "text", "text": QUESTION}], "Which colour?"):
            history.append({"role": "user", "content": content})
            answers.append(assistant.ask(history, params=params).text)
            history.append({"role": "assistant", "content": answers[-1]})
        last = {"role": "user", "content": [image_part, {"type": "text", "text": "Describe the clip"}]}
        answers.append(assistant.ask([last], params=params).text)
    first, about_video, *rest = shown.stdout.splitlines()
    assert first == answers[0]
    assert about_video == f"Your next question is about {clip}."
    assert rest == [*answers[1:3], *rest[2:4], answers[3]]


def test_a_mistake_is_one_line_and_the_chat_goes_on(tiny_valley: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video at all")
    lines = [
        "/nothing",
        "/video",
        "/video none.mp4",
        f"/video {text}",
        QUESTION,
        "see <video>",
        "",
        "yes no",
        "/quit",
        "x",
    ]
    shown = talk(*lines, options=("--model", tiny_valley, "--max-tokens", 4))
    assert shown.returncode == 0
    errors = shown.stderr.splitlines()
    assert len(errors) == 5
    assert all(error.startswith("valley-ray: error: ") for error in errors)
    for error, part in zip(
        errors, ("/help lists", "needs a file", "none.mp4", "text.mp4", "stands for media"), strict=True
    ):
        assert part in error
    assert len(shown.stdout.splitlines()) == 2  # the bad video was taken note of; one question was answered


def test_an_error_leaves_history_as_it_was_and_drops_media_that_cannot_be_read() -> None:
    model = Model()
    chat = Chat(model.stream, system_prompt="Be brief.")
    assert chat.ask("one", lambda delta: None)
    before = list(chat.messages)
    assert before[1] == {"role": "assistant", "content": "answer 1 and more"}
    chat.show("video", "bad.mp4")
    model.error = CorruptMediaError("bad.mp4: broken")
    with pytest.raises(CorruptMediaError):
        chat.ask("two", lambda delta: None)
    assert (chat.messages, chat.pending) == (before, [])
    chat.show("video", "good.mp4")
    model.error = PromptTooLongError("too long")
    with pytest.raises(PromptTooLongError):
        chat.ask("three", lambda delta: None)
    assert chat.messages == before
    assert len(chat.pending) == 1
    assert chat.ask("four", lambda delta: None)
    system, *rest = model.asked[-1]
    assert system == {"role": "system", "content": "Be brief."}
    assert rest[:2] == before
    assert rest[2]["content"][0] == {"type": "video_url", "video_url": {"url": "good.mp4"}}


def test_an_interrupted_answer_counts_as_far_as_it_was_said() -> None:
    model = Model()
    chat = Chat(model.stream)
    model.error, model.error_after = KeyboardInterrupt(), 1
    assert not chat.ask("one", lambda delta: None)
    assert [message["content"] for message in chat.messages] == ["one", "answer 1"]
    model.error, model.error_after = KeyboardInterrupt(), 0
    chat.show("image", "a.png")
    assert not chat.ask("two", lambda delta: None)
    assert len(chat.messages) == 2
    assert len(chat.pending) == 1


def test_a_mark_that_the_model_writes_stands_for_nothing_later() -> None:
    def stream(messages: list[Message]) -> Generator[str]:
        yield f"a <video> {' '.join(ADDED_TOKENS)} here"

    chat = Chat(stream)
    chat.ask("one", lambda delta: None)
    assert not [mark for mark in ("<video>", *ADDED_TOKENS) if mark in chat.messages[1]["content"]]


def test_bytes_that_are_no_text_end_the_chat_in_one_line(tiny_valley: Path) -> None:
    command = [*COMMAND, "--model", str(tiny_valley), "--max-tokens", "2"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"\xff\n", env=environment, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)
    assert b"not valid UTF-8" in done.stderr


def test_a_url_is_downloaded_once_for_all_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(url: str, *, allow_hosts: tuple[str, ...], **_: object) -> tuple[bytes, None]:
        asked.append((url, allow_hosts))
        return b"bytes", None

    monkeypatch.setattr("valley_ray.fetch_http.download", download)
    kept = [kept_locator(f"https://example.org/{name}.mp4?key=1", tmp_path) for name in "ab"]
    assert [Path(one).name for one in kept] == ["a.mp4", "b.mp4"]
    assert [Path(one).read_bytes() for one in kept] == [b"bytes"] * 2
    assert [hosts for _, hosts in asked] == [("example.org",)] * 2


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny_valley: Path) -> None:
    command = [*COMMAND, "--model", str(tiny_valley), "--max-tokens", "400"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("yes no\n")
        first = process.stdout.read(1)  # the answer has begun
        os.kill(process.pid, signal.SIGINT)
        answer = first + process.stdout.readline()
        process.stdin.write("/reset\n")
        process.stdin.close()
        rest = process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert answer.endswith("(ended)\n")
    assert rest.startswith("Forgotten.")


def test_a_terminal_shows_a_prompt_and_ctrl_d_leaves(tiny_valley: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--model", str(tiny_valley), "--max-tokens", "4"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        assert read_until(ours, b"> ").startswith(b"Ask, or /help")
        os.write(ours, b"/help\n")
        assert b"/image FILE" in read_until(ours, b"> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(ours)


def test_the_model_is_checked_before_anything_is_asked(tmp_path: Path) -> None:
    shown = talk(QUESTION, options=("--model", tmp_path))
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "no model at" in shown.stderr


def read_until(handle: int, end: bytes) -> bytes:
    """What a terminal showed up to and with `end`."""
    shown = b""
    while not shown.endswith(end):
        shown += os.read(handle, 1)
    return shown
