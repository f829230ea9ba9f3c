"""A token of an answer → its text, its bytes and how likely it was, as the logprobs of the API show them."""

import re
from typing import Any

from valley_ray.engine.engine import TokenEvent
from valley_ray.processor import ValleyProcessor
from valley_ray.serve.protocol import TokenChance, TokenLogprob

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a token that is one byte of a character."""


def token_logprob(processor: ValleyProcessor, event: TokenEvent, before: int | None) -> TokenLogprob:
    """What the API tells about one token; `before` is the answer's token in front of it, None at its beginning.

    The event must carry log-probabilities.
    """
    assert event.logprob is not None, "the request asked for log-probabilities"
    text, utf8 = token_text(processor, event.token_id, before)
    top = [TokenChance(*token_text(processor, token, before), logprob) for token, logprob in event.top_logprobs]
    return TokenLogprob(text, utf8, event.logprob, tuple(top))


def token_text(processor: ValleyProcessor, token_id: int, before: int | None) -> tuple[str, bytes | None]:
    """What a token adds to the text after `before`, the space between words included, and its bytes.

    The bytes are None for a token that is no text (its text is then its name), and for a part of a character whose
    bytes the tokenizer does not tell.
    """
    # The house's Tokenizer does not name the method: nothing else needs pieces.
    tokenizer: Any = processor.tokenizer
    piece: str | None = tokenizer.convert_ids_to_tokens(token_id)
    byte = _BYTE_PIECE.fullmatch(piece or "")
    if byte is not None:
        raw = bytes.fromhex(byte[1])
        return raw.decode("utf-8", "replace"), raw
    context = [] if before is None else [before]
    text = processor.decode_raw([*context, token_id])[len(processor.decode_raw(context)) :]
    if not text:
        return piece or "", None
    return text, None if "\ufffd" in text else text.encode()
