"""SourceConfig: what a user writes for one source of clips and samples. Knows no format."""

import itertools
import os
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from valley_ray.config import Config

FormatName = Literal[
    "llava", "videochat", "valley-instruct", "vatex", "msvd-qa", "msrvtt-qa", "activitynet-qa", "folder", "table"
]


def _as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Locator = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
"""A local path, or a URL of a file system: file, s3, gs, http(s), or any other that fsspec knows."""


class SourceConfig(Config):
    """One source: a file of records, or a folder of media."""

    path: Locator
    """The file of records, the folder of media, or one media file."""
    format: Literal["auto"] | FormatName = "auto"
    """What `path` holds; auto: told by its ending and its first records."""
    media_root: Locator | None = None
    """Folder that media names of the records are relative to; None: the folder that `path` lies in."""
    name: str | None = Field(default=None, min_length=1)
    """Name in the column `source` of the samples; None: the last part of `path`, with `#2`, `#3`, ... behind it where
    that is taken."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How densely its samples come in a mixed order, relative to its size; see `mixing_order`."""
    companion: Locator | None = None
    """Second file of a format that has two: the answers of activitynet-qa, the id map of msvd-qa; None: the usual name
    beside `path`."""


def distinct_name(name: str, taken: Collection[str]) -> str:
    """`name`, or where it is taken, `name#2` or the first higher number that is not."""
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain((name,), numbered) if one not in taken)
