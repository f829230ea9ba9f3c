from collections.abc import Sequence
from typing import Any

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


WORDS = {1: "go", 2: " to", 3: " the", 4: " en", 5: "d", 6: " of", 7: "#", 8: "##", 9: " it", 10: "红", 11: "色"}


def streamed(token_ids: Sequence[int], *stops: str, reason: str = "length", **options: Any) -> tuple[list[str], int]:
    """Deltas, and the number of tokens that were taken."""
    stream = TextStream(lambda ids: "".join(WORDS[one] for one in ids), (STOP,), stops, **options)
    sent = []
    for index, token in enumerate(token_ids):
        sent.append(stream.push(TokenEvent("r", token, index, reason if index == len(token_ids) - 1 else None)))
        if stream.stopped:
            break
    assert "".join(sent) == stream.text
    return sent, len(sent)


def test_nothing_of_a_stop_string_is_sent_however_tokens_cut_it() -> None:
    assert streamed([1, 2, 3, 4, 5, 6], "the end") == (["", "go", " to", "", ""], 5)
    assert streamed([1, 7, 8, 9], "###") == (["", "", "go"], 3)
    assert streamed([10, 11, 10, 11], "色红") == (["红", "", ""], 3)


def test_what_only_began_like_a_stop_string_is_sent_after_all() -> None:
    assert streamed([1, 2, 3, 6, 9], "the end", "of them") == (["", "go", " to", " the", " of it"], 5)
    assert streamed([1, 7], "###") == (["", "go#"], 2)
    assert streamed([1, 7, STOP], "###", reason="stop") == (["", "", "go#"], 3)


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    sent, _ = streamed([1, 2, 3, 4, 5], "end", "the e", "to the end")
    assert "".join(sent) == "go to"


def test_a_stop_string_in_the_first_token_ends_an_answer_unless_upstreams_rule_is_asked_for() -> None:
    assert streamed([1, 2, 3], "go") == ([""], 1)
    assert streamed([1, 2, 3], "go", skip_first_token=True) == (["", "go to"], 2)
    assert streamed([1, 2, 3], "to", skip_first_token=True) == (["", "go to"], 2)


def test_the_tokens_text_is_cleaned_by_the_given_rule() -> None:
    sent, _ = streamed([9, 1, 2], "###", clean=lambda text: text.strip().removeprefix("it"))
    assert "".join(sent) == "go to"
