"""What counts as a word, and as the same answer, in any script. Knows texts alone."""

import unicodedata

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts that write no spaces between words: each letter with its marks is a word of its own."""
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+")
_HAN = regex.compile(r"\p{Han}")
_ARTICLES = frozenset(("a", "an", "the"))
_YES_OR_NO = frozenset(("yes", "no"))


def words(text: str) -> list[str]:
    """The words of a text in lower case, punctuation left out; Chinese, Japanese or Thai letter by letter."""
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFKC", text).lower())]


def has_chinese(text: str) -> bool:
    """Whether there is a Chinese character in it."""
    return _HAN.search(text) is not None


def is_same(prediction: str, reference: str) -> bool:
    """Equal as a whole, case and outer white space aside."""
    return prediction.strip().lower() == reference.strip().lower()


def is_same_answer(prediction: str, reference: str) -> bool:
    """Equal as open-ended question answering counts it: words alone, without English articles.

    Where the reference says yes or no, the first word of the prediction decides ("Yes, he does." is yes). A reference
    without a word is met by a prediction without one.
    """
    ours, theirs = _content(prediction), _content(reference)
    if len(theirs) == 1 and theirs[0] in _YES_OR_NO:
        return ours[:1] == theirs
    return ours == theirs


def _content(text: str) -> list[str]:
    found = words(text)
    # "A" alone is an answer to a question with choices.
    return [word for word in found if word not in _ARTICLES] or found
