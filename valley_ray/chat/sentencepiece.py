"""SentencePieceTokenizer: LLaMA's tokenizer.model read by the sentencepiece library itself.

Upstream's ids come from the slow LLaMA tokenizer, which transformers 5 no longer has; its fast one differs around added
tokens and runs of spaces. This one gives the slow one's ids when driven by `chat.tokens.tokenize`.
"""

import json
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from valley_ray.errors import CheckpointError

MODEL_FILE = "tokenizer.model"
ADDED_TOKENS_FILE = "added_tokens.json"
CONFIG_FILE = "tokenizer_config.json"


class SentencePieceTokenizer:
    """A tokenizer folder of the 2023 layout: tokenizer.model and added_tokens.json.

    `added` names the added tokens and their ids instead of that file.
    """

    def __init__(self, folder: Path, *, added: dict[str, int] | None = None) -> None:
        self._folder = folder
        self._processor = SentencePieceProcessor()
        try:
            self._processor.Load(str(folder / MODEL_FILE))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{folder / MODEL_FILE} is no sentencepiece model; copy it again") from error
        self._added = _read_added_tokens(folder / ADDED_TOKENS_FILE) if added is None else added
        special = (self._processor.bos_id(), self._processor.eos_id(), self._processor.unk_id())
        self._special = {self._processor.IdToPiece(token): token for token in special if token >= 0}

    @property
    def bos_token_id(self) -> int | None:
        """Id of <s>."""
        token = self._processor.bos_id()
        return token if token >= 0 else None

    @property
    def eos_token_id(self) -> int | None:
        """Id of </s>."""
        token = self._processor.eos_id()
        return token if token >= 0 else None

    @property
    def pad_token_id(self) -> int | None:
        """Id of [PAD], None before it is added."""
        return self._added.get("[PAD]")

    def __len__(self) -> int:
        return self._processor.GetPieceSize() + len(self._added)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, which holds no added token; the model puts its own space in front."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return [self._processor.bos_id(), *ids] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `token_ids`; with `skip_special_tokens` <s>, </s>, <unk> and [PAD] are left out.

        The other added tokens stay, with a space around them: as the slow LLaMA tokenizer of transformers 4.28 does.
        Ids that are no token give nothing: models whose token table was padded can choose them.
        """
        special = {*self._special.values(), self.pad_token_id}
        text_of_added = {token: text for text, token in (self._special | self._added).items()}
        parts: list[str] = []
        run: list[int] = []
        for token in token_ids:
            if token not in text_of_added:
                run += [int(token)] * (0 <= token < self._processor.GetPieceSize())
            elif not (skip_special_tokens and token in special):
                parts += [*self._texts_of(run), text_of_added[token]]
                run = []
        return " ".join([*parts, *self._texts_of(run)])

    def _texts_of(self, run: list[int]) -> list[str]:
        return [self._processor.DecodeIds(run)] if run else []

    def get_vocab(self) -> dict[str, int]:
        """Every piece and added token with its id."""
        pieces = {self._processor.IdToPiece(token): token for token in range(self._processor.GetPieceSize())}
        return pieces | self._added

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens, and <s>, </s> and <unk>: what the text is cut at."""
        return self._special | self._added

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write tokenizer.model, added_tokens.json and a tokenizer_config.json."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for name in (MODEL_FILE, CONFIG_FILE):
            source = self._folder / name
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)
        (target / ADDED_TOKENS_FILE).write_text(json.dumps(self._added, indent=2), encoding="utf-8")


def _read_added_tokens(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        added = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(added, dict) or not all(isinstance(token, int) for token in added.values()):
        raise CheckpointError(f"{path} must map token texts to ids")
    return added
