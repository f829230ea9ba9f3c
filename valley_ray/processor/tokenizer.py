"""Opens the tokenizer of a model folder, whichever library wrote it."""

from pathlib import Path

from valley_ray.chat.tokens import Tokenizer
from valley_ray.errors import CheckpointError


def open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer: tokenizer.json by transformers, else tokenizer.model by sentencepiece."""
    from valley_ray.chat.sentencepiece import MODEL_FILE, SentencePieceTokenizer

    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises Exception itself, transformers whatever an odd file leads to
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder}: the tokenizer cannot be opened ({reason}); copy its files again"
            ) from error
        return tokenizer
    if (folder / MODEL_FILE).is_file():
        return SentencePieceTokenizer(folder)
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor {MODEL_FILE}; copy the tokenizer's files beside the model"
    )
