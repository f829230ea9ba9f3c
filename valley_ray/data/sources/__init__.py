"""Data sets as they are published, and folders and tables of your own → the clips and samples tables.

config.py           what a user writes for one source
registry.py         formats by name; which one a path holds
catalog.py          all sources → one catalog on disk, streamed
records.py          the same in memory, for small lists
mixing.py           the order of the samples of several sources, by weight
llava.py            lists of conversations (LLaVA, Valley-webvid2M) and their kin:
videochat.py        VideoChat's pairs of questions and answers
valley_instruct.py  Valley-Instruct's windows
vatex.py            VATEX: captions
video_qa.py         MSVD-QA and MSRVTT-QA
activitynet_qa.py   ActivityNet-QA: questions and answers in two files
folder.py           a plain folder of videos
table.py            CSV, JSON lines, Parquet
rows.py             one record → one row, or the reason why not
media.py            where a record's file lies
json_text.py        JSON lists of any length, a record at a time
files.py            bytes and lines from disks, buckets and http
objects.py          one media file in a bucket, for whoever decodes it

A record that cannot be used keeps its row, with status failed and the reason. Knows no decoder, tokenizer or Ray.
"""

from valley_ray.data.sources.catalog import (
    CATALOG_FILE,
    CatalogSummary,
    SourceSummary,
    read_catalog,
    read_summary,
    write_catalog,
)
from valley_ray.data.sources.config import SourceConfig
from valley_ray.data.sources.media import clip_row, places
from valley_ray.data.sources.mixing import mixing_order
from valley_ray.data.sources.records import join, read_records
from valley_ray.data.sources.registry import detect, open_source
from valley_ray.data.sources.rows import CatalogRow

__all__ = [
    "CATALOG_FILE",
    "CatalogRow",
    "CatalogSummary",
    "SourceConfig",
    "SourceSummary",
    "clip_row",
    "detect",
    "join",
    "mixing_order",
    "open_source",
    "places",
    "read_catalog",
    "read_records",
    "read_summary",
    "write_catalog",
]
