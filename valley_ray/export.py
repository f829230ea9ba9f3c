"""A Valley in two parts for other servers: a plain language model, and what makes its prompts out of media.

The folder itself is a Hugging Face causal language model, as `vllm serve FOLDER --enable-prompt-embeds` opens it; what
stands before it (tower, projector, pooling, processor) lies in its subfolder `visual`. `PromptEmbedder` opens that and
makes embeddings, which such a server takes instead of tokens. Knows no server.
L prompt tokens, D hidden width, Dv tower width, P patches, T frames.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from valley_ray.answering import build_prompt, check_fit
from valley_ray.assistant import AskInput, Locator, Question
from valley_ray.chat.conversation import Conversation, Message
from valley_ray.convert import CARD_FILE, check_output, open_whole, whole_folder
from valley_ray.errors import CheckpointError
from valley_ray.looking import Eyes
from valley_ray.media.sampling import FrameSampling
from valley_ray.model.checkpoint import read_model_config
from valley_ray.model.language_folder import write_language_model
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.model.weight_files import find_files, read_weights
from valley_ray.processor import ValleyProcessor

logger = logging.getLogger(__name__)

VISUAL_FOLDER = "visual"
_LANGUAGE_MODEL = "core.language_model."

_TEMPLATES = {
    "valley": (
        "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else SYSTEM_PROMPT -%}"
        "{{- bos_token -}}{%- if system.strip() -%}{{- system.strip() + '\\n\\n' -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{- '### Human: ' + message['content'].strip() + '\\n' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- '### Assistant: ' + message['content'].strip() + eos_token + '\\n' -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Assistant:' -}}{%- endif -%}"
    )
}
"""Chat templates (Jinja) of prompt styles, for questions without media."""


def export_vllm(
    source: str | Path, output: str | Path, *, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the model folder `source` as `output`: a plain language model, and the parts that see in `visual`.

    Args:
        source: any folder that `from_pretrained` opens; adapters are merged.
        output: a new or empty folder.
        base: the model under a bare adapter folder; None: the one that the adapter names.
        dtype: of the written weights; None: as in the files.

    Raises:
        CheckpointError: `source` cannot be opened, `output` holds something already or cannot be written.
    """
    source, output = Path(source), Path(output)
    check_output(output)
    model, processor = open_whole(source, base=base, dtype=dtype)
    check_fit(model.config, processor)
    with whole_folder(output) as folder:
        write_language_model(model.core.language_model, folder, generation_config=model.generation_config)
        has_template = _write_tokenizer(processor, folder)
        visual = folder / VISUAL_FOLDER
        processor.save_pretrained(visual)
        model.config.save_pretrained(visual)
        parts = {name: part for name, part in model.state_dict().items() if not name.startswith(_LANGUAGE_MODEL)}
        save_file({name: part.contiguous() for name, part in parts.items()}, visual / "model.safetensors")
        card = _card(model, processor, name=output.name, source=source.resolve().name, has_template=has_template)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


class PromptEmbedder:
    """Questions about media → prompt embeddings for a server of the exported language model.

    Use as a context manager, or call `close`: decoding runs in a child process.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        """Open the parts that `export_vllm` wrote; of the language model, the input embeddings alone.

        Raises CheckpointError where the folder is none of them.
        """
        folder = Path(folder)
        if not (folder / VISUAL_FOLDER / "config.json").is_file():
            raise CheckpointError(
                f"{folder} has no {VISUAL_FOLDER}/config.json; give a folder that `valley-ray export-vllm` wrote"
            )
        self.model = _open_visual(folder).to(device).eval()
        self.processor = ValleyProcessor.from_pretrained(folder / VISUAL_FOLDER)
        check_fit(self.model.config, self.processor)
        self._device, self._eyes = device, Eyes(self.model, self.processor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding child, where one was started."""
        self._eyes.close()

    @torch.inference_mode()
    def embed(
        self,
        question: Question,
        *,
        video: Locator | Sequence[Locator] | None = None,
        image: Locator | Sequence[Locator] | None = None,
        sampling: FrameSampling | None = None,
    ) -> torch.Tensor:
        """[L, D] on the CPU, in the dtype of the weights; arguments and errors are those of `Assistant.ask`."""
        conversation, media = AskInput(question, video, image).conversation()
        prompt = build_prompt(self.processor, conversation, [self._eyes.look_at(part, sampling) for part in media])
        input_ids = torch.tensor(prompt.input_ids, device=self._device)
        embeds: torch.Tensor = self.model.core.embed(input_ids, prompt.visual_tokens)
        return embeds.cpu()


class _TokenTable(nn.Module):
    """A language model of which the input embeddings alone are here."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.embed_tokens: nn.Embedding = nn.Embedding(num_tokens, width)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self) -> None:
        raise NotImplementedError("the language model is the server's")


def _open_visual(folder: Path) -> ValleyForConditionalGeneration:
    config = read_model_config(folder / VISUAL_FOLDER)
    table = _input_embeddings(folder, config.text_config)
    state = read_weights(find_files(folder / VISUAL_FOLDER))
    state[f"{_LANGUAGE_MODEL}embed_tokens.weight"] = table
    model = ValleyForConditionalGeneration(config, language_model=_TokenTable(*table.shape))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / VISUAL_FOLDER}: {len(missing)} weights missing, {len(unexpected)} unexpected "
            f"({', '.join([*missing, *unexpected][:3])}); export the model again"
        )
    return model


def _input_embeddings(folder: Path, text_config: Any) -> torch.Tensor:
    """[V, D] of the exported language model."""
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(text_config)
    table = language_model.get_input_embeddings().weight
    [name] = [name for name, parameter in language_model.named_parameters() if parameter is table]
    weights = read_weights(find_files(folder))
    if name not in weights:
        raise CheckpointError(f"{folder} has no weight {name}; export the model again")
    return weights[name]


def _write_tokenizer(processor: ValleyProcessor, folder: Path) -> bool:
    """The tokenizer as transformers opens it, and a chat template where that gives the model's own prompts."""
    processor.tokenizer.save_pretrained(folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of whatever class: transformers raises many over a tokenizer of 2023
        logger.warning("the export has no chat template: transformers does not open its tokenizer (%s)", error)
        return False
    template = _TEMPLATES.get(processor.prompt_style)
    if template is not None:
        tokenizer.chat_template = template.replace(
            "SYSTEM_PROMPT", json.dumps(processor.system_prompt, ensure_ascii=False)
        )
        if not _gives_our_prompts(tokenizer, processor):
            tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return tokenizer.chat_template is not None


def _gives_our_prompts(tokenizer: PreTrainedTokenizerBase, processor: ValleyProcessor) -> bool:
    turns = Message("user", "What is moving?"), Message("assistant", "A red circle."), Message("user", "Where to?")
    for asked in (turns[:1], turns):
        messages = [{"role": one.role, "content": one.content} for one in asked]
        templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if tuple(templated) != processor.encode_prompt(Conversation(asked), ()):
            return False
    return True


def _card(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor, *, name: str, source: str, has_template: bool
) -> str:
    """The README.md of the folder."""
    stops = json.dumps(list(processor.stop_strings), ensure_ascii=False)
    return _CARD.format(
        name=name,
        source=source,
        dtype=str(model.dtype).removeprefix("torch."),
        width=model.get_input_embeddings().embedding_dim,
        stop=f'"stop": {stops}, ' if processor.stop_strings else "",
        chat=_HAS_TEMPLATE if has_template else _HAS_NO_TEMPLATE,
    )


_CARD = """# {name}

The language model of `{source}` as a plain Hugging Face folder, and in `visual` what turns videos and images into its
prompts: tower, projector, pooling, processor (of valley_ray).

## Serve it

From the folder in which `{name}` lies:

    vllm serve {name} --enable-prompt-embeds --dtype {dtype}

## Ask it about a video

A prompt is a tensor [tokens, {width}] of {dtype}: embeddings of the text around those of the video. `pip install
valley-ray` makes them, on any machine with this folder, again from the one in which it lies:

```python
import base64
import io

import httpx
import torch
from valley_ray.export import PromptEmbedder

with PromptEmbedder("{name}") as embedder:
    embeds = embedder.embed("What is moving?", video="clip.mp4")
buffer = io.BytesIO()
torch.save(embeds, buffer)
body = {{"model": "{name}", "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(), {stop}"temperature": 0}}
reply = httpx.post("http://127.0.0.1:8000/v1/completions", json=body | {{"max_tokens": 128}}, timeout=600)
print(reply.json()["choices"][0]["text"].strip())
```

In other words: `visual/model.safetensors` has `core.mm_projector` (features of the tower, frame token first, to width
{width}) and `core.pooling`; a prompt has its visual tokens where its token ids say `<im_patch>` and `<vi_frame>`, and
`model.embed_tokens` of this folder everywhere else.

## Ask it without a video

{chat}
"""

_HAS_TEMPLATE = "`POST /v1/chat/completions` takes questions of text: the tokenizer has the model's own chat template."
_HAS_NO_TEMPLATE = (
    "The prompt style of this model has no chat template; `embedder.embed(question)` makes text prompts too."
)
