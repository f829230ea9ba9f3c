"""Exporting for vLLM: a plain language model with the same logits, the prompts of the whole model, clear refusals."""

import base64
import io
import re
from pathlib import Path

import httpx
import pytest
import torch
from clips import write_clip
from engine_cases import needs_vllm
from tiny import make_tiny_valley
from transformers import AutoModelForCausalLM, AutoTokenizer

from valley_ray.answering import load_model
from valley_ray.assistant import Assistant
from valley_ray.chat.conversation import Conversation, Message
from valley_ray.cli import main
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import CheckpointError
from valley_ray.export import PromptEmbedder, export_vllm
from valley_ray.model.lora import LoraSettings, add_lora, save_adapter
from valley_ray.processor import ValleyProcessor

QUESTION = "What is moving?"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Valley with heads that vLLM serves."""
    return make_tiny_valley(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, exported."""
    folder = tmp_path_factory.mktemp("exported") / "tiny-vllm"
    assert main(["export-vllm", str(model_folder), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="module")
def embeds(exported: Path, clip: Path) -> torch.Tensor:
    """The prompt of a question about the clip, made from the exported parts."""
    with PromptEmbedder(exported) as embedder:
        return embedder.embed(QUESTION, video=clip)


@pytest.fixture(scope="module")
def answer(model_folder: Path, clip: Path) -> list[int]:
    """What the whole model says to it."""
    with Assistant.from_pretrained(model_folder) as assistant:
        return list(assistant.ask(QUESTION, video=clip, params=SamplingParams(max_tokens=12)).token_ids)


@torch.no_grad()
def test_plain_transformers_opens_the_folder_with_equal_logits(model_folder: Path, exported: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    ids = torch.arange(3, 23)[None]
    assert torch.equal(plain(ids).logits, load_model(model_folder).core.language_model(ids).logits)
    assert plain.generation_config.eos_token_id == AutoTokenizer.from_pretrained(exported).eos_token_id


def test_embeddings_of_a_question_about_a_video_lead_to_the_models_answer(
    exported: Path, embeds: torch.Tensor, answer: list[int]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(exported).eval()
    output = plain.generate(inputs_embeds=embeds[None], max_new_tokens=12, do_sample=False)
    assert output[0].tolist() == answer


def test_the_chat_template_gives_the_models_own_prompts(exported: Path) -> None:
    tokenizer, processor = AutoTokenizer.from_pretrained(exported), ValleyProcessor.from_pretrained(exported / "visual")
    asked = Message("system", "Say yes or no."), Message("user", "How many shapes do you see?")
    for messages in (asked, asked[1:]):
        templated = tokenizer.apply_chat_template(
            [{"role": one.role, "content": one.content} for one in messages],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert tuple(templated) == processor.encode_prompt(Conversation(messages), ())


def test_the_example_of_the_readme_runs(
    exported: Path,
    clip: Path,
    embeds: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    asked: list[dict[str, object]] = []

    def post(url: str, *, json: dict[str, object], timeout: float) -> httpx.Response:
        asked.append(json)
        return httpx.Response(200, json={"choices": [{"text": " a circle "}]})

    monkeypatch.setattr(httpx, "post", post)
    monkeypatch.chdir(exported.parent)
    exec(code.replace("clip.mp4", str(clip)), {})
    assert capsys.readouterr().out == "a circle\n"
    [body] = asked
    sent = torch.load(io.BytesIO(base64.b64decode(str(body["prompt_embeds"]))))
    assert torch.equal(sent, embeds)
    assert body["model"] == exported.name


def test_an_adapter_is_merged(model_folder: Path, tmp_path: Path) -> None:
    model = load_model(model_folder)
    add_lora(model.core, LoraSettings(r=2))
    with torch.no_grad():
        for name, parameter in model.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model.core, tmp_path / "adapter")
    export_vllm(tmp_path / "adapter", tmp_path / "new", base=model_folder)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = model.core.language_model.eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()(ids).logits
        # 1e-5: the same sum in another order, of logits of order 1.
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(merged, load_model(model_folder).core.language_model(ids).logits, atol=1e-2)


def test_what_cannot_be_exported_is_one_line(
    model_folder: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, output, complaint in (
        (model_folder, exported, "is not empty; name a new folder"),
        (tmp_path, tmp_path / "new", "has no config.json or adapter_config.json"),
        (exported, tmp_path / "new", "model_type"),
    ):
        assert main(["export-vllm", str(source), str(output)]) == 2
        shown = capsys.readouterr()
        assert complaint in shown.err
        assert shown.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="give a folder that `valley-ray export-vllm` wrote"):
        PromptEmbedder(model_folder)


@needs_vllm
def test_plain_vllm_opens_the_folder_and_gives_the_models_answer(
    exported: Path, embeds: torch.Tensor, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import LLM
    from vllm import SamplingParams as VllmParams

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = LLM(
        str(exported),
        enable_prompt_embeds=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=2,
        enforce_eager=True,
        kv_cache_memory_bytes=64 * 2**20,
    )
    params = VllmParams(max_tokens=12, temperature=0)
    [output] = llm.generate({"prompt_embeds": embeds}, params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == answer
