"""What a worker is at, written down where its death does not erase it. Knows no Ray and no decoder.

A worker that dies takes its block with it, and Ray begins the block again, without a word about which clip was under
way. Each run over a block therefore keeps one small file beside the shards, with its node in the name; the next run
over the same block reads those of the runs before it, which never ended. Where a whole node has gone, no clip is to
blame, and its runs do not count.
"""

import collections
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

SUFFIX = ".journal"
THIS_MACHINE = "local"
"""Name of the node where nobody gave it one."""

IsAlive = Callable[[str], bool]
"""Whether the node of that name still runs."""


class BlockJournal:
    """The clip under way in one run over a block, as a context manager; removed where the run ends by itself.

    Attributes:
        deaths: clip_id -> how many earlier runs over this block ended while that clip was under way.
        deaths_between: how many ended with no clip under way.
    """

    def __init__(
        self, directory: Path, block: str, *, node: str = THIS_MACHINE, is_alive: IsAlive = lambda name: True
    ) -> None:
        self._before = sorted(directory.glob(f".{block}.*{SUFFIX}"))
        lives = {name: name == node or is_alive(name) for name in {_node_of(path) for path in self._before}}
        last_lines = [_last_line(path) for path in self._before if lives[_node_of(path)]]
        self.deaths = collections.Counter(line for line in last_lines if line)
        self.deaths_between = sum(not line for line in last_lines)
        self._path = directory / f".{block}.{node}.{uuid.uuid4().hex[:8]}{SUFFIX}"

    def __enter__(self) -> Self:
        # Unbuffered: what the kernel has got survives the process.
        self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for path in (*self._before, self._path):
            path.unlink(missing_ok=True)

    def begin(self, clip_id: str) -> None:
        """The clip is under way now."""
        self._file.write(f"{clip_id}\n".encode())

    def end(self) -> None:
        """No clip is under way now."""
        self._file.write(b"\n")


def remove_journals(directory: Path) -> None:
    """Forget the deaths of earlier pipelines: they were stopped, most likely, by what stopped the pipeline."""
    for path in directory.glob(f".*{SUFFIX}"):
        path.unlink(missing_ok=True)


def _node_of(path: Path) -> str:
    """The node in a journal's name, `.BLOCK.NODE.RUN.journal`."""
    return path.name.rsplit(".", 3)[1]


def _last_line(path: Path) -> str:
    """The last whole line; empty where there is none or the file has gone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 256))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return lines[-2] if len(lines) > 1 else ""
