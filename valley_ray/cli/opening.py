"""What asking commands do before the first answer: cheap checks first, then the model, opened fast and quietly."""

import argparse
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from valley_ray.cli.arguments import DEFAULT_MODEL, read_settings
from valley_ray.errors import CheckpointError, ConfigError, ConversationError

if TYPE_CHECKING:
    from valley_ray.assistant import Assistant
    from valley_ray.fetch import FetchPolicy
    from valley_ray.media.sampling import FrameSampling

_SMALL_MODEL = 50_000_000
"""Parameters. Below it a second torch thread gains little on an idle CPU, and on a busy one each of the many small
steps waits for both threads: measured 25 times slower on two cores with two other processes."""


def check_model(folder: Path) -> None:
    """Said before anything heavy is imported; `from_pretrained` checks all the rest."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    if folder == DEFAULT_MODEL:
        raise CheckpointError(f"no model at {folder}: run `make quickstart`, which makes it, or name another folder")
    raise CheckpointError(f"no model at {folder} (a model folder holds a config.json); check the path")


def check_question(question: str) -> None:
    """Raise ConversationError for a question without words or with bytes that are no text."""
    if not question.strip():
        raise ConversationError("the question is empty; ask something, for example 'What is moving?'")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ConversationError("the question is not valid UTF-8; check the terminal's encoding") from error


def check_paths(locators: Sequence[str]) -> None:
    """Raise for a missing file at once rather than after the model was opened; URLs and data: URIs can wait."""
    from valley_ray.fetch import FetchPolicy, fetch, locator_kind

    for locator in locators:
        if locator_kind(locator) in ("path", "file"):
            fetch(locator, FetchPolicy())


def read_sampling(options: argparse.Namespace) -> "FrameSampling | None":
    """What the options of `add_frames` say, over --set and the model folder's own; None where they say nothing."""
    wishes = {"num_frames": options.num_frames, "fps": options.fps, "start_s": options.start, "end_s": options.end}
    given = {key: value for key, value in wishes.items() if value is not None}
    if not given:
        return None
    from valley_ray.config import validate_config
    from valley_ray.media.sampling import FrameSampling
    from valley_ray.processor import read_processor_config

    folder = options.model if options.base is None else options.base
    own = read_processor_config(folder, settings=read_settings(options)).sampling.model_dump()
    if "num_frames" in given or "fps" in given:
        own.update(num_frames=None, fps=None)
    return validate_config(FrameSampling, {**own, **given}, source="the command line")


def open_assistant(options: argparse.Namespace, *, policy: "FetchPolicy") -> "Assistant":
    """The assistant that the options of `add_assistant` name, for one answer at a time; small models get one thread."""
    with _quick_start():
        import torch

        from valley_ray.assistant import Assistant

        quiet_libraries()
        assistant = Assistant.from_pretrained(
            options.model,
            device=_device(options.device),
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            settings=read_settings(options),
            splice=options.splice,
            base=options.base,
            num_slots=1,
            policy=policy,
            decoder=options.decoder,
        )
        if assistant.model.num_parameters() < _SMALL_MODEL:
            torch.set_num_threads(1)
    return assistant


def _device(name: str | None) -> str:
    """`name`, checked; None: a GPU where there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()  # "meta" makes tensors, but they hold nothing
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); try cpu") from error
    return name


def quiet_libraries() -> None:
    """No progress bars and advice of transformers; no warnings of DeepSpeed, which go to stdout."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def policy_for(locators: Sequence[str]) -> "FetchPolicy":
    """Allows the hosts of these URLs and no other: whoever types a URL means its host."""
    from urllib.parse import urlsplit

    from valley_ray.fetch import FetchPolicy, locator_kind

    urls = [locator for locator in locators if locator_kind(locator) == "http"]
    return FetchPolicy(allow_hosts=tuple(urlsplit(url).hostname or "" for url in urls))


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
