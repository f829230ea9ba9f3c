"""Questions about held-out clips: asked in this process through the engine, and again over HTTP."""

import base64
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from valley_ray.assistant import Answer, AskInput, Assistant
from valley_ray.errors import TrainingError
from valley_ray.nano.questions import SINGLE_KINDS
from valley_ray.serve.app import ServedApp
from valley_ray.serve.app import run as run_server
from valley_ray.serve.config import ServeConfig

Record = dict[str, Any]
"""One entry of heldout.json: a clip, one question, its truth and its kind."""


def question_of(record: Record) -> str:
    """The question without its media mark."""
    text: str = record["conversations"][0]["value"]
    return text.removeprefix("<video>").strip()


def truth_of(record: Record) -> str:
    """The one right answer."""
    text: str = record["conversations"][1]["value"]
    return text


def ask_in_process(model: Path, data_root: Path, asked: Sequence[Record]) -> list[Answer]:
    """One answer per record, in order; raises TrainingError where a clip cannot be read."""
    questions = (AskInput(question_of(row), video=data_root / row["video"]) for row in asked)
    # Ray's processes live on the same cores: a second thread for so small a model would only wait for them.
    torch.set_num_threads(1)
    with Assistant.from_pretrained(model, num_slots=32) as assistant:
        answers = assistant.answer_batch(tqdm(questions, "held-out questions", len(asked), unit="q"))
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        raise TrainingError(f"{len(failed)} held-out clips could not be read; the first: {failed[0]}")
    return answers


def ask_over_http(
    data_root: Path, model: Path, asked: Sequence[Record], answers: Sequence[Answer], *, num_served: int
) -> dict[str, int]:
    """Ask one question about each of `num_served` clips, the kinds in turn, the clip as a path and as data: in turn.

    Returns how many were asked and how many answers equal those of `answers`.
    """
    chosen: dict[str, int] = {}
    for number, row in enumerate(asked):
        wanted = SINGLE_KINDS[len(chosen) % len(SINGLE_KINDS)]
        if len(chosen) < num_served and row["video"] not in chosen and row["kind"] == wanted:
            chosen[row["video"]] = number
    if not chosen:
        return {"num": 0, "num_equal": 0}
    num_equal = 0
    with run_server(ServeConfig(model=model, allow_roots=(data_root,)), port=0, log_level="WARNING") as app:
        for turn, number in enumerate(tqdm(chosen.values(), "asked over HTTP", unit="q")):
            clip = data_root / asked[number]["video"]
            url = _data_uri(clip) if turn // len(SINGLE_KINDS) % 2 else str(clip)
            num_equal += _ask_server(app, url, question_of(asked[number])) == answers[number].text
    return {"num": len(chosen), "num_equal": num_equal}


def _data_uri(clip: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"


def _ask_server(app: ServedApp, url: str, question: str) -> str:
    body = {
        "model": app.model_name,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": url}},
                    {"type": "text", "text": question},
                ],
            }
        ],
    }
    request = urllib.request.Request(
        f"{app.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: str = json.load(reply)["choices"][0]["message"]["content"]
    return answer
