"""The whole server over HTTP: beside a one-request-at-a-time worker, cold beside warm, split beside colocated; hops."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

from valley_ray.benchmarks.job import Say
from valley_ray.benchmarks.serve.asking import Ask, ask_at_once, ask_server, ask_worker
from valley_ray.benchmarks.serve.child import Child
from valley_ray.benchmarks.serve.config import ServeCost
from valley_ray.benchmarks.serve.model import make_served_model, make_videos, questions
from valley_ray.benchmarks.serve.rounds import Side, compare
from valley_ray.serve.config import ServeConfig
from valley_ray.storage import storage_root

NUM_CLIENTS = 16
NUM_VIDEOS = 4
"""That are asked about again and again."""
_NUM_COLD = 4
"""Videos per round of the cold and the warm."""
_NUM_TOKENS_COLD = 8
_MODEL = "bench"


@dataclass(frozen=True)
class Bench:
    """What all servers have in common."""

    config: ServeCost
    work: Path
    known: Sequence[Path]
    """NUM_VIDEOS."""
    new: Sequence[Path]
    """Videos that a server sees once: NUM_CLIENTS for every round."""
    cold: Sequence[Path]

    def rounds_of_known(self, seed: int) -> list[list[Ask]]:
        """Sixteen questions about four videos per round."""
        videos = [self.known[number % NUM_VIDEOS] for number in range(NUM_CLIENTS)]
        return [self._asks(videos, 1000 * seed + number) for number in range(self.config.num_rounds)]

    def rounds_of_new(self, seed: int) -> list[list[Ask]]:
        """Sixteen questions about as many videos per round, none of which comes again."""
        return [
            self._asks(self.new[number * NUM_CLIENTS : (number + 1) * NUM_CLIENTS], 1000 * seed + number)
            for number in range(self.config.num_rounds)
        ]

    def _asks(self, videos: Sequence[Path], seed: int) -> list[Ask]:
        texts = questions(len(videos), seed)
        return [Ask(video, text, self.config.num_new_tokens) for video, text in zip(videos, texts, strict=True)]

    @contextmanager
    def our_server(self, shape: Literal["split", "colocated"]) -> Iterator[Side]:
        """A server that knows the known videos."""
        config = ServeConfig(
            model=self.work / "model", model_name=_MODEL, allow_roots=(self.known[0].parent,), shape=shape
        )
        with _child(self.config, self.work, "server", config.model_dump_json(exclude_unset=True), shape) as child:
            side = Side(shape, child, partial(ask_server, child.url, _MODEL))
            for _ in range(2):  # the second time finds the videos, and fills the caches of compiled shapes
                ask_at_once(self.rounds_of_known(9)[0], side.answer)
            yield side

    @contextmanager
    def worker(self) -> Iterator[Side]:
        """What a server is compared with, warmed up."""
        with _child(self.config, self.work, "worker", str(self.work / "model"), "worker") as child:
            side = Side("worker", child, partial(ask_worker, child.url))
            ask_at_once(self.rounds_of_known(9)[0][:2], side.answer)
            yield side


def server_numbers(config: ServeCost, say: Say) -> dict[str, object]:
    """Keys of all parts but `engines`, as far as they are asked for, and the medians behind them."""
    folder = (storage_root() / config.folder).absolute()
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    numbers: dict[str, object] = {}
    if "hops" in config.parts:
        with _child(config, work, "hops", str(config.num_pulls), "hops") as child:
            numbers |= child.numbers()
        say(f"both hops, ms: {numbers['hop_ms_p50']}")
    if not {"worker", "video", "shapes"} & set(config.parts):
        return numbers
    bench, size = _make_bench(config, folder, work)
    say(f"servers: a model of {size / 1e6:.1f} million parameters, {NUM_CLIENTS} clients")
    if {"worker", "video"} & set(config.parts):
        with bench.our_server("split") as server:
            if "video" in config.parts:
                numbers |= _cold_and_warm(bench, server, say)
            if "worker" in config.parts:
                numbers |= _beside_worker(bench, server, say)
    if "shapes" in config.parts:
        numbers |= _shapes(bench, say)
    return numbers | {"num_parameters": size}


def _make_bench(config: ServeCost, folder: Path, work: Path) -> tuple[Bench, int]:
    """The videos and the model, and the number of its parameters."""
    size = make_served_model(work / "model", config)
    num_new, num_cold = (config.num_rounds * count for count in (NUM_CLIENTS, _NUM_COLD))
    videos = make_videos(folder, config, NUM_VIDEOS + num_new + num_cold)
    known, new, cold = videos[:NUM_VIDEOS], videos[NUM_VIDEOS:-num_cold], videos[-num_cold:]
    return Bench(config, work, known, new, cold), size


def _child(config: ServeCost, work: Path, module: str, argument: str, name: str) -> Child:
    """A module of this room as a process, with a log of its own."""
    return Child(f"{__package__}.{module}", argument, log=work / f"{name}.log", num_threads=config.num_threads)


def _beside_worker(bench: Bench, server: Side, say: Say) -> dict[str, object]:
    with bench.worker() as worker:
        known = compare("4 videos", (server, worker), bench.rounds_of_known(1), say)
        new = compare("all distinct", (server, worker), bench.rounds_of_new(2), say)
    return {
        "server_vs_worker_16": known.ratio,
        "server_vs_worker_16_distinct": new.ratio,
        "server_and_worker": {"4 videos": known.medians, "all distinct": new.medians},
    }


def _shapes(bench: Bench, say: Say) -> dict[str, object]:
    with bench.our_server("split") as split, bench.our_server("colocated") as colocated:
        new = compare("shapes, all distinct", (split, colocated), bench.rounds_of_new(3), say)
        known = compare("shapes, 4 videos", (split, colocated), bench.rounds_of_known(4), say)
    return {
        "split_vs_colocated": new.ratio,
        "split_vs_colocated_4_videos": known.ratio,
        "shapes": {"4 videos": known.medians, "all distinct": new.medians},
    }


def _cold_and_warm(bench: Bench, server: Side, say: Say) -> dict[str, object]:
    """One client, one question after the other; raises AssertionError where a video is encoded a second time."""
    texts = questions(2 * len(bench.cold), 5000)
    cold, warm = list[float](), list[float]()
    encoded = list[int]()
    for place, video in enumerate(bench.cold):
        for times, text in zip((cold, warm), texts[2 * place : 2 * place + 2], strict=True):
            before = server.child.numbers()["num_encoded"]
            times.append(1000 * server.answer(Ask(video, text, _NUM_TOKENS_COLD)).first_s)
            encoded.append(server.child.numbers()["num_encoded"] - before)
    assert encoded[::2] == [1] * len(cold), f"a new video is encoded once, got {encoded[::2]}"
    assert not any(encoded[1::2]), f"a warm video is not encoded, got {encoded[1::2]}"
    ratio = median(one / other for one, other in zip(warm, cold, strict=True))
    say(f"time to the first text, ms: cold {median(cold):.0f}, warm {median(warm):.0f}")
    return {
        "warm_ttft_ratio": round(ratio, 3),
        "ttft_ms": {"cold": round(median(cold), 1), "warm": round(median(warm), 1)},
        "warm_encoder_calls": sum(encoded[1::2]),
    }
