"""Adapters of a served model, asked by the OpenAI client, against each adapter's folder opened alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from clips import write_clip
from ray import serve
from tiny_adapters import make_adapter

from valley_ray.assistant import Assistant
from valley_ray.engine.engine import SamplingParams
from valley_ray.serve.app import APP_NAME, ServedApp, run
from valley_ray.serve.config import DeploymentConfig, ServeConfig

pytestmark = pytest.mark.ray

QUESTION = "What is moving?"
NAMES = ("tiny", "tiny:red", "tiny:blue")


@pytest.fixture(scope="module")
def folders(tiny_valley: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "tiny": tiny_valley,
        "tiny:red": make_adapter(tiny_valley, folder / "red", seed=1),
        "tiny:blue": make_adapter(tiny_valley, folder / "blue", seed=2, r=8, use_dora=True),
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{seed}.mp4", seed=seed) for seed in range(2)]


def settings(folders: dict[str, Path], clips: list[Path], **fields: Any) -> ServeConfig:
    small = DeploymentConfig(num_cpus=0.1)
    adapters = {name.partition(":")[2]: folder for name, folder in folders.items() if ":" in name}
    sizes = {"ingress": small, "decoder": small, "encoder": small, "sampler": small, **fields}
    return ServeConfig(
        model=folders["tiny"], model_name="tiny", adapters=adapters, allow_roots=(clips[0].parent,), **sizes
    )


def ask(app: ServedApp, model: str, clip: Path, question: str = QUESTION) -> str:
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)
    video = {"type": "video_url", "video_url": {"url": str(clip)}}
    content: Any = [video, {"type": "text", "text": question}]
    messages: Any = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=16)
    assert reply.model == model
    return reply.choices[0].message.content or ""


def num_opened() -> int:
    """Adapters that both decoders have opened since they started."""
    handle = serve.get_deployment_handle("LanguageDecoder", APP_NAME)
    opened: dict[int, int] = {}
    for _ in range(200):
        stats = handle.stats.remote().result()
        opened[stats["process_id"]] = stats["num_adapters_opened"]
        if len(opened) == 2:
            break
    assert len(opened) == 2, "there are two decoders"
    return sum(opened.values())


def expected(folders: dict[str, Path], clips: list[Path]) -> dict[tuple[str, Path], str]:
    answers = {}
    for name, folder in folders.items():
        with Assistant.from_pretrained(folder) as assistant:
            for clip in clips:
                answers[name, clip] = assistant.ask(QUESTION, video=clip, params=SamplingParams(max_tokens=16)).text
    assert len(set(answers.values())) == len(answers), "the test needs answers that differ"
    return answers


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_openai_client_asks_base_and_adapters_at_the_same_time(
    local_ray: None, folders: dict[str, Path], clips: list[Path]
) -> None:
    answers = expected(folders, clips)
    # One place for adapters: red and blue take turns, the base does not wait for them.
    with run(settings(folders, clips, shape="colocated", max_adapters=1), port=0) as app:
        asked = [(name, clip) for clip in clips for name in NAMES] * 2
        with ThreadPoolExecutor(len(asked)) as pool:
            assert list(pool.map(lambda one: ask(app, *one), asked)) == [answers[one] for one in asked]
        client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)
        assert [(model.id, model.parent) for model in client.models.list()] == [
            ("tiny", None),
            ("tiny:red", "tiny"),
            ("tiny:blue", "tiny"),
        ]
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny', 'tiny:red', 'tiny:blue'"):
            ask(app, "tiny:green", clips[0])
        stats = serve.get_deployment_handle("LanguageDecoder", APP_NAME).stats.remote().result()
        assert stats["num_adapters"] == 1
        assert stats["num_encoded"] == len(clips)


@pytest.mark.slow
def test_an_adapter_stays_on_the_replica_that_has_it(
    local_ray: None, folders: dict[str, Path], clips: list[Path]
) -> None:
    """Two decoders with room for one adapter each: sent anywhere, adapters would push each other out all the time."""
    answers = expected(folders, clips)
    decoder = DeploymentConfig(num_cpus=0.1, num_replicas=2)
    with run(settings(folders, clips, decoder=decoder, max_adapters=1), port=0) as app:
        asked = [(name, clip) for name in NAMES[1:] for clip in clips] * 2
        before = num_opened()
        # Routers hear a moment later who has opened what.
        for _ in range(60):
            assert [ask(app, *one) for one in asked] == [answers[one] for one in asked]
            now = num_opened()
            if now == before:
                break
            before = now
        assert now == before, "adapters are opened again and again"
