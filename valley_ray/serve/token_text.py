"""A token of an answer → its text, its bytes and how likely it was, as the logprobs of the API show them."""

import re

from transformers import PreTrainedTokenizerBase

from valley_ray.engine.engine import TokenEvent
from valley_ray.serve.protocol import TokenChance, TokenLogprob

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"
"""Stands for a space in SentencePiece's pieces."""


def token_logprob(tokenizer: PreTrainedTokenizerBase, event: TokenEvent) -> TokenLogprob:
    """What the API tells about one token; the event must carry log-probabilities."""
    assert event.logprob is not None, "the request asked for log-probabilities"
    text, utf8 = token_text(tokenizer, event.token_id)
    top = [TokenChance(*token_text(tokenizer, token_id), logprob) for token_id, logprob in event.top_logprobs]
    return TokenLogprob(text, utf8, event.logprob, tuple(top))


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> tuple[str, bytes | None]:
    """The text of one token with the space before it, and its bytes; None where they are a part of a character that
    this tokenizer does not tell."""
    piece: str = tokenizer.convert_ids_to_tokens(token_id)
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte is not None:
        raw = bytes.fromhex(byte[1])
        return raw.decode("utf-8", "replace"), raw
    if _WORD_START in piece:
        text = piece.replace(_WORD_START, " ")
    else:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
    return text, None if "\ufffd" in text else text.encode()
