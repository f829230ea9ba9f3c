from collections.abc import Sequence

from valley_ray.answering import TextStream
from valley_ray.engine.engine import TokenEvent

STOP = 0


def deltas(pieces: dict[int, bytes], token_ids: Sequence[int], *, reason: str = "length") -> list[str]:
    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[one] for one in ids).decode("utf-8", errors="replace").strip()

    stream = TextStream(decode, (STOP,))
    last = len(token_ids) - 1
    return [
        stream.push(TokenEvent("r", token, index, reason if index == last else None))
        for index, token in enumerate(token_ids)
    ]


def test_words_are_sent_once_they_are_whole() -> None:
    pieces = {1: b" a", 2: b" circ", 3: b"le", 4: b" moves", 5: b"."}
    assert deltas(pieces, [1, 2, 3, 4, 5]) == ["", "a", "", " circle", " moves."]


def test_half_a_character_is_held_back() -> None:
    star = "★".encode()
    pieces = {1: b"a ", 2: star[:1], 3: star[1:2], 4: star[2:], 5: "方".encode()}
    sent = deltas(pieces, [1, 2, 3, 4, 5])
    assert "".join(sent) == "a ★方"
    assert "�" not in "".join(sent)


def test_text_without_spaces_does_not_wait_for_the_end() -> None:
    pieces = {1: "红".encode(), 2: "色".encode(), 3: "圆".encode()}
    assert deltas(pieces, [1, 2, 3]) == ["红", "色", "圆"]


def test_the_stop_token_is_no_text() -> None:
    assert deltas({1: b"yes", 2: b"</s>"}, [1, STOP], reason="stop") == ["", "yes"]


def test_a_tokenizer_that_rewrites_text_is_never_contradicted() -> None:
    texts = {1: "he", 2: "he does", 3: "HE does"}
    stream = TextStream(lambda ids: texts[len(ids)], ())
    sent = [stream.push(TokenEvent("r", 7, index, "length" if index == 2 else None)) for index in range(3)]
    assert sent == ["", "he", ""]
