"""The language model of a Valley as a plain Hugging Face folder, which knows nothing of media."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

SHARD_SIZE = "5GB"


def write_language_model(
    language_model: PreTrainedModel, folder: Path, *, generation_config: GenerationConfig | None = None
) -> None:
    """Write config.json, safetensors and generation_config.json; `AutoModelForCausalLM` and vLLM open them.

    `generation_config` None: the language model's own.
    """
    language_model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
