"""What kind of question each sample asks, as its file says: accuracies are told by kind. Knows formats, no media.

ActivityNet-QA numbers its kinds in `type` of the file of answers (its README names them); MSVD-QA and MSRVTT-QA go by
the first word of the question (Xu et al. 2017); other record lists may say `kind`, `question_type` or `type`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from valley_ray.data.sources import CatalogSummary, SourceConfig
from valley_ray.data.sources.files import beside, last_part, normalized
from valley_ray.data.sources.json_text import read_json_list

ACTIVITYNET_KINDS = (
    "motion",
    "spatial relation",
    "temporal relation",
    "yes/no",
    "color",
    "object",
    "location",
    "number",
    "other",
)
QUESTION_WORDS = ("what", "who", "how", "when", "where")
KIND_KEYS = ("kind", "question_type", "type")
_LOOKED_AT = 32
"""Records at the beginning of a list of which one must say its kind."""
_LISTS = ("llava", "videochat", "valley-instruct")

Kinds = Mapping[tuple[str, str], str]
"""(source, sample_id) → kind."""


def read_kinds(sources: Sequence[SourceConfig], summary: CatalogSummary) -> Kinds:
    """The kinds that the files of a catalog's sources say; a second pass over those that say any.

    Raises:
        DataError: a file cannot be read any more.
    """
    kinds: dict[tuple[str, str], str] = {}
    names: dict[str, str] = {}
    for config, source in zip(sources, summary.sources, strict=True):
        for sample_id, kind in _said(config, source.name, source.format):
            kinds[source.name, sample_id] = names.setdefault(kind, kind)
    return kinds


def kind_of(kinds: Kinds, *, source: str, format_name: str, sample_id: str, question: str) -> str:
    """The kind of one question; empty where nothing says it."""
    if format_name in ("msvd-qa", "msrvtt-qa"):
        first = next(iter(question.lower().split()), "")
        return first if first in QUESTION_WORDS else "other"
    # The catalog numbers an id that is there twice.
    return kinds.get((source, sample_id)) or kinds.get((source, sample_id.rpartition("#")[0]), "")


def _said(config: SourceConfig, name: str, format_name: str) -> Iterator[tuple[str, str]]:
    path = normalized(config.path)
    if format_name == "activitynet-qa":
        companion = config.companion or beside(path, last_part(path).replace("_q.", "_a."))
        for record in read_json_list(companion):
            if isinstance(record, dict) and record.get("type") is not None:
                yield str(record.get("question_id")), _activitynet_kind(record["type"])
    elif format_name in _LISTS and (key := _key_of(path)) is not None:
        for row, record in enumerate(read_json_list(path)):
            if isinstance(record, dict) and record.get(key) is not None:
                yield str(record.get("id", f"{name}#{row}")), str(record[key])


def _activitynet_kind(value: Any) -> str:
    number = int(value) if str(value).isdecimal() else -1
    return ACTIVITYNET_KINDS[number] if 0 <= number < len(ACTIVITYNET_KINDS) else str(value)


def _key_of(path: str) -> str | None:
    first = [record for record in itertools.islice(read_json_list(path), _LOOKED_AT) if isinstance(record, dict)]
    return next((key for key in KIND_KEYS if any(isinstance(record.get(key), str) for record in first)), None)
