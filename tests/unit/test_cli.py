"""The command line: answers on stdout, one line and exit code 2 for mistakes, nothing heavy before it is needed."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clips import write_clip
from PIL import Image

import valley_ray
from valley_ray.assistant import Assistant
from valley_ray.cli import main
from valley_ray.cli.entry import build_parser
from valley_ray.cli.opening import policy_for, read_sampling
from valley_ray.engine.engine import SamplingParams
from valley_ray.media.sampling import FrameSampling

QUESTION = "What is moving?"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """`ask` owns its process and sets torch's threads; here it does not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def run(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "valley_ray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload,no-any-return]


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that `main` writes for a mistake."""
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("valley-ray: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_ask_answers_as_the_assistant_and_says_nothing_else(tiny_valley: Path, clip: Path) -> None:
    shown = run("ask", "--model", tiny_valley, "--video", clip, QUESTION, "--max-tokens", 12)
    assert (shown.returncode, shown.stderr) == (0, "")
    with Assistant.from_pretrained(tiny_valley) as assistant:
        answer = assistant.ask(QUESTION, video=clip, params=SamplingParams(max_tokens=12))
    assert shown.stdout == answer.text + "\n"


def test_every_option_reaches_the_assistant(
    tiny_valley: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    Image.linear_gradient("L").save(image)
    other = tmp_path / "other.png"
    Image.radial_gradient("L").save(other)
    words = [
        "--max-tokens",
        "9",
        "--temperature",
        "0.8",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--system-prompt",
        "Describe",
    ]
    words += ["--stop", "###", "--stop", "up"]
    frames = ["--fps", "4", "--start", "0.25", "--end", "1.25"]
    media = ["--video", str(clip), "--image", str(image), "--image", str(other)]
    assert main(["ask", "--model", str(tiny_valley), QUESTION, "--json", *words, *frames, *media]) == 0
    with Assistant.from_pretrained(tiny_valley) as assistant:
        expected = assistant.ask(
            QUESTION,
            video=clip,
            image=[image, other],
            sampling=FrameSampling(num_frames=None, fps=4, start_s=0.25, end_s=1.25),
            params=SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=3),
            system_prompt="Describe",
            stop=("###", "up"),
        )
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("seconds") > 0
    assert shown == {
        "answer": expected.text,
        "finish_reason": expected.finish_reason,
        "num_prompt_tokens": expected.num_prompt_tokens,
        "num_tokens": len(expected.token_ids),
    }


def test_switches_to_what_the_original_does_reach_the_assistant(
    tiny_valley: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    switches = ["--prompt-style", "upstream-serve", "--splice", "upstream-serve", "--set", "max_length=400"]
    command = ["ask", "--model", str(tiny_valley), "--video", str(clip), QUESTION, "--json", "--max-tokens", "8"]
    assert main([*command, *switches, "--device", "cpu", "--dtype", "float32"]) == 0
    settings = {"prompt_style": "upstream-serve", "max_length": 400}
    with Assistant.from_pretrained(tiny_valley, settings=settings, splice="upstream-serve") as assistant:
        expected = assistant.ask(QUESTION, video=clip, params=SamplingParams(max_tokens=8))
    shown = json.loads(capsys.readouterr().out)
    assert (shown["answer"], shown["num_prompt_tokens"]) == (expected.text, expected.num_prompt_tokens)
    assert "prompt_style='none'" in complaint(capsys, *command, "--prompt-style", "none")
    assert "did you mean 'prompt_style'" in complaint(capsys, *command, "--set", "prompt_stile=valley")
    for device in ("banana", "meta"):
        assert f"--device {device} cannot be used" in complaint(capsys, *command, "--device", device)


def test_a_question_needs_no_media(tiny_valley: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--model", str(tiny_valley), "yes no"]) == 0
    assert len(capsys.readouterr().out) > 1


def test_a_window_alone_keeps_the_models_own_number_of_frames(tiny_valley: Path, clip: Path) -> None:
    def sampling(*arguments: str) -> FrameSampling | None:
        return read_sampling(build_parser().parse_args(["ask", QUESTION, "--model", str(tiny_valley), *arguments]))

    video = ("--video", str(clip))
    assert sampling(*video) is None
    assert sampling(*video, "--start", "1") == FrameSampling(num_frames=4, start_s=1)
    assert sampling(*video, "--num-frames", "2") == FrameSampling(num_frames=2)
    assert sampling(*video, "--fps", "2", "--end", "3") == FrameSampling(num_frames=None, fps=2, end_s=3)
    by_directory = ("--set", "sampling.folder_order=directory", "--num-frames", "2")
    assert sampling(*video, *by_directory) == FrameSampling(num_frames=2, folder_order="directory")


def test_every_video_that_is_named_is_shown(tiny_valley: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ask", "--model", str(tiny_valley), QUESTION, "--json", "--max-tokens", "2"]
    lengths = []
    for videos in (1, 2, 3):
        assert main([*command, *["--video", str(clip)] * videos]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["num_prompt_tokens"])
    assert lengths[2] - lengths[1] == lengths[1] - lengths[0] > 4


def test_mistakes_are_one_line(
    tiny_valley: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video at all")
    ask = ["ask", "--model", tiny_valley]
    video = [*ask, "--video", clip]
    assert "required: COMMAND" in complaint(capsys)
    assert "see `valley-ray ask --help`" in complaint(capsys, "ask")
    assert "unrecognized arguments: --num" in complaint(capsys, *video, QUESTION, "--num", 3)
    assert "not allowed with" in complaint(capsys, *video, QUESTION, "--num-frames", 3, "--fps", 2)
    assert "add --video FILE" in complaint(capsys, *ask, QUESTION, "--num-frames", 2)
    assert "num_frames=0" in complaint(capsys, *video, QUESTION, "--num-frames", 0)
    assert "end_s must be after start_s" in complaint(capsys, *video, QUESTION, "--start", 2, "--end", 1)
    assert "no frame between" in complaint(capsys, *video, QUESTION, "--start", 60)
    assert "expected a whole number at least 1, got '0'" in complaint(capsys, *ask, QUESTION, "--max-tokens", 0)
    assert "expected a number at least 0, got 'nan'" in complaint(capsys, *ask, QUESTION, "--temperature", "nan")
    assert "expected a number over 0 and at most 1" in complaint(capsys, *ask, QUESTION, "--top-p", 1.5)
    assert "max_tokens=9999" in complaint(capsys, *ask, QUESTION, "--max-tokens", 9999)
    assert "invalid choice: 'opencv' (choose from" in complaint(capsys, *video, QUESTION, "--decoder", "opencv")
    assert "question is empty" in complaint(capsys, *ask, " ")
    assert "not valid UTF-8" in complaint(capsys, *ask, "\udcff")
    assert "none.mp4: cannot be read (No such file" in complaint(
        capsys, *ask, QUESTION, "--video", tmp_path / "none.mp4"
    )
    assert "text.mp4" in complaint(capsys, *ask, QUESTION, "--video", text)
    assert "not a public address" in complaint(capsys, *ask, QUESTION, "--image", "http://127.0.0.1/a.png")
    assert "no model at" in complaint(capsys, "ask", "--model", tmp_path, QUESTION)


def test_a_missing_nano_model_says_which_command_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no model at models/nano: run `make quickstart`" in complaint(capsys, "ask", QUESTION)
    assert "no model at models/nano: run `make quickstart`" in complaint(capsys, "serve")


def test_a_mistake_ends_the_process_with_2_and_no_traceback(tiny_valley: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    shown = run("ask", "--model", tiny_valley, "--video", empty, QUESTION)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("valley-ray: error: ")
    assert "empty.mp4" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_typing_a_url_allows_its_host_and_no_other() -> None:
    assert policy_for(["https://example.org/a.mp4"]).allow_hosts == ("example.org",)
    assert policy_for(["clip.mp4", "data:video/mp4;base64,AAAA"]).allow_hosts == ()


def test_a_reader_that_leaves_is_no_error(tiny_valley: Path) -> None:
    command = [sys.executable, "-m", "valley_ray.cli", "ask", "--model", str(tiny_valley), "yes no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_interrupts_end_quietly(tiny_valley: Path) -> None:
    command = [sys.executable, "-m", "valley_ray.cli", "ask", "--model", str(tiny_valley), "yes no"]
    command += ["--max-tokens", "480"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # the answer has begun
        os.kill(process.pid, signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130


def test_version_and_help_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, shown in (
        (["--version"], valley_ray.__version__),
        (["--help"], "serve"),
        (["ask", "--help"], "--num-frames"),
        (["serve", "--help"], "KEY=VALUE"),
        (["chat", "--help"], "/reset"),
        (["doctor", "--help"], "--json"),
        (["convert", "--help"], "--dtype"),
        (["merge-lora", "--help"], "--adapter"),
        (["make-delta", "--help"], "--target"),
        (["apply-delta", "--help"], "--delta"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert shown in capsys.readouterr().out


def test_serve_names_what_is_wrong_before_ray_starts(
    tiny_valley: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model={tiny_valley}"
    assert "did you mean 'num_replicas'" in complaint(capsys, "serve", model, "decoder.num_replica=2")
    assert "cannot read configuration" in complaint(capsys, "serve", tmp_path / "none.yaml")
    assert "must have the form key=value" in complaint(capsys, "serve", model, "more")
    assert "port=70000" in complaint(capsys, "serve", model, "--port", 70000)
    other = tmp_path / "other.yaml"
    other.write_text("applications: [{import_path: 'other:app'}]")
    assert "valley_ray.serve.app:build" in complaint(capsys, "serve", other)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in complaint(capsys, "serve", model, "--port", port)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert f"RAY_ADDRESS='127.0.0.1:{port}' cannot be joined" in complaint(capsys, "serve", model, "--port", 0)
