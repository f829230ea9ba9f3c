"""A language model behind an OpenAI-compatible URL judges answers: right or not, and a score from 0 to 5.

The measure of Video-ChatGPT (Maaz et al. 2023), in words of our own. Replies are kept in a file as they come: nobody
pays twice for one verdict. What fails is counted and leaves its row without a verdict.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from valley_ray.evaluate.config import JudgeConfig
from valley_ray.evaluate.ledger import LedgerWriter, read_answers

logger = logging.getLogger(__name__)

SYSTEM = (
    "You compare answers to questions about videos with their references. An answer is right if it says the same thing "
    "as the reference, in whatever words; further details that do not contradict it do no harm. Reply with one JSON "
    'object and nothing else: {"correct": "yes" or "no", "score": whole number from 0 (unrelated) to 5 (the same)}.'
)
QUESTION = "Question: {question}\nReference: {reference}\nAnswer: {prediction}"
_OBJECT = re.compile(r"\{[^{}]*\}")
_MAX_TOKENS = 200
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_BUSY = (408, 409, 425, 429)


@dataclass(frozen=True)
class Case:
    """What is judged."""

    question: str
    reference: str
    prediction: str


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    is_right: bool | None = None
    score: float | None = None
    """0..5"""
    error: str = ""
    """Why there is none."""


def judge(
    cases: Sequence[Case],
    config: JudgeConfig,
    kept: Path,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Verdict]:
    """A verdict for each case, in order; those that the file `kept` holds are not asked for again.

    At most `config.concurrency` requests run at once. A busy server, a broken connection and a reply without a verdict
    are tried `config.retries` times more, after growing pauses (`sleep`) or the one that the server asks for; any other
    refusal is not. Raises nothing for failures: they are verdicts with an error.
    """
    there = read_answers(kept)
    keys = [_key(case, config) for case in cases]
    missing = {key: case for key, case in zip(keys, cases, strict=True) if key not in there}
    failed: dict[str, Verdict] = {}
    lock = threading.Lock()
    kept.parent.mkdir(parents=True, exist_ok=True)
    api_key = os.environ.get(config.api_key_variable)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with (
        LedgerWriter(kept) as ledger,
        httpx.Client(timeout=config.timeout_s, headers=headers) as client,
        ThreadPoolExecutor(config.concurrency) as pool,
    ):

        def one(key: str) -> None:
            verdict = _ask(client, missing[key], config, sleep)
            with lock:
                if verdict.error:
                    failed[key] = verdict
                else:
                    there[key] = {"key": key, **asdict(verdict)}
                    ledger.append(there[key])

        for _ in pool.map(one, missing):
            pass
    if failed:
        logger.warning("%d of %d answers have no verdict; the first: %s", len(failed), len(cases), _first(failed))
    return [failed[key] if key in failed else _verdict(there[key]) for key in keys]


def read_verdict(text: str) -> Verdict | None:
    """The verdict in a reply, whatever words stand around its object; None where there is none."""
    for found in reversed(_OBJECT.findall(text)):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        correct, score = str(values.get("correct")).strip().lower(), values.get("score")
        try:
            number = float(score)
        except (TypeError, ValueError):
            continue
        if correct in ("yes", "no", "true", "false") and 0 <= number <= 5:
            return Verdict(correct in ("yes", "true"), number)
    return None


def _ask(client: httpx.Client, case: Case, config: JudgeConfig, sleep: Callable[[float], None]) -> Verdict:
    body = {
        "model": config.model,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION.format(**asdict(case))},
        ],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
    }
    reason, asked_pause_s = "", 0.0
    for attempt in range(config.retries + 1):
        if attempt:
            sleep(min(_LONGEST_PAUSE_S, asked_pause_s or _FIRST_PAUSE_S * 2 ** (attempt - 1)))
        asked_pause_s = 0.0
        try:
            reply = client.post(f"{config.url.rstrip('/')}/chat/completions", json=body)
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if reply.status_code in _BUSY or reply.status_code >= 500:
            asked_pause_s = _pause_s(reply)
            reason = f"status {reply.status_code}"
            continue
        if reply.status_code != httpx.codes.OK:
            return Verdict(error=f"status {reply.status_code}: {' '.join(reply.text.split())[:200]}")
        text = _text(reply)
        if (verdict := read_verdict(text)) is not None:
            return verdict
        reason = f"no verdict in the reply {text!r:.100}"
    return Verdict(error=reason)


def _text(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


def _pause_s(reply: httpx.Response) -> float:
    value = reply.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _verdict(kept: dict[str, Any]) -> Verdict:
    return Verdict(kept["is_right"], kept["score"])


def _first(failed: dict[str, Verdict]) -> str:
    return next(iter(failed.values())).error


def _key(case: Case, config: JudgeConfig) -> str:
    text = json.dumps([config.url, config.model, SYSTEM, asdict(case)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
