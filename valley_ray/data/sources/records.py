"""Record files → the two tables in memory, for files that fit there; catalog.py streams the others."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from valley_ray.data.schema import CLIPS_SCHEMA, SAMPLES_SCHEMA, check_clips, check_samples
from valley_ray.data.sources.llava import read_conversations
from valley_ray.data.sources.media import Media
from valley_ray.data.sources.rows import Source
from valley_ray.errors import DataError


def read_records(path: Path, *, media_root: Path, name: str | None = None) -> tuple[pa.Table, pa.Table]:
    """Read a JSON list of conversations into (clips, samples), in file order; media are looked for at their `places`.

    Samples that name the same file share one row of the clips table. One `<image>` mark for a list of images stands for
    all of them, as the frames of one clip (upstream); as many marks as images stand for one each. `name` is what the
    samples carry as their source; None: that of the file.

    Raises:
        DataError: the file is missing, is not JSON, or is not a list. Bad records inside it are failed rows instead.
    """
    source = Source(str(path), name or path.name, Media(str(media_root)))
    rows = list(read_conversations(source))
    clips = {clip["clip_id"]: clip for row in rows for clip in row.clips}
    return (
        pa.Table.from_pylist(list(clips.values()), schema=CLIPS_SCHEMA),
        pa.Table.from_pylist([row.sample for row in rows if row.sample], schema=SAMPLES_SCHEMA),
    )


def join(tables: Sequence[tuple[pa.Table, pa.Table]]) -> tuple[pa.Table, pa.Table]:
    """Put the (clips, samples) of several files together, a clip that several of them name once; checks the result.

    Raises:
        DataError: a table breaks its schema, or there is no sample at all.
    """
    if not tables or not sum(samples.num_rows for _, samples in tables):
        raise DataError("no record to work on: the record files are empty; give at least one file with records")
    clips = {clip["clip_id"]: clip for table, _ in tables for clip in table.to_pylist()}
    joined = check_clips(pa.Table.from_pylist(list(clips.values()), schema=CLIPS_SCHEMA))
    return joined, check_samples(pa.concat_tables([samples for _, samples in tables]), joined)
