"""How a command line is read, and what `valley-ray serve` says once it answers."""

from pathlib import Path

import pytest

from valley_ray.cli.entry import build_parser
from valley_ray.cli.serve import _print_welcome
from valley_ray.errors import ConfigError


def test_options_may_stand_between_the_words_of_serve() -> None:
    changes = ["adapters={mine: runs/adapter}", "decoder.num_replicas=2"]
    options = build_parser().parse_args(["serve", "a.yaml", "--port", "8123", changes[0], "--host", "::1", changes[1]])
    assert (options.words, options.port, options.host) == (["a.yaml", *changes], 8123, "::1")
    options = build_parser().parse_args(["serve", "--port", "8123", *changes])
    assert (options.words, options.port) == (changes, 8123)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ask", "--vidoe", "x", "What?"], "--vidoe (did you mean --video?); see `valley-ray ask --help`"),
        (["ask", "What?", "--vidoe=x"], "--vidoe=x (did you mean --video?); see `valley-ray ask --help`"),
        (["ask", "What?", "--qqq"], "--qqq; see `valley-ray ask --help`"),
        (["ask", "What", "moves?"], "moves?; see `valley-ray ask --help`"),
        (["serve", "a.yaml", "--prot", "1", "a=b"], "--prot (did you mean --port?); see `valley-ray serve --help`"),
    ],
)
def test_only_what_is_unknown_is_blamed_with_what_was_meant(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_parser().parse_args(words)
    assert str(caught.value) == f"unrecognized arguments: {said}"


def test_serve_names_a_placeholder_for_the_file_and_the_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    from valley_ray.serve.app import ServedApp
    from valley_ray.serve.config import ServeConfig

    served = ServedApp("http://127.0.0.1:8000", "nano")
    adapters = {"mine": Path("runs/mine"), "other": Path("runs/other")}
    _print_welcome(served, ServeConfig(model=Path("models/nano"), allow_roots=(Path("runs"),), adapters=adapters))
    shown = capsys.readouterr().out
    assert f'"{Path("runs").absolute()}/FILE.mp4"' in shown
    assert "nano:mine, nano:other" in shown
    _print_welcome(served, ServeConfig(model=Path("models/nano")))
    shown = capsys.readouterr().out
    assert '"/FOLDER/FILE.mp4"' in shown
    assert "adapters" not in shown
