"""Where the outside parity set lies and how its files encode ids; the set's content is never named here."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(os.environ.get("VALLEY_PARITY", Path(__file__).parents[2].parent / "shared" / "parity"))


def require_set() -> None:
    """Skip the test where there is no set."""
    if not ROOT.is_dir():
        pytest.skip(f"{ROOT} is absent; set VALLEY_PARITY to a parity set")


def load_json(name: str) -> dict[str, Any]:
    """A JSON file of the set; skips the test where the set or the file is absent."""
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{path} is absent; set VALLEY_PARITY to a parity set")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def expand_ids(runs: list[list[int]]) -> list[int]:
    """[[id, count], ...] → ids."""
    return [token for token, count in runs for _ in range(count)]


def expand_labels(input_ids: list[int], spans: list[list[int]]) -> npt.NDArray[np.int64]:
    """Labels that keep the ids in the half-open spans and are -100 elsewhere."""
    labels = np.full(len(input_ids), -100, dtype=np.int64)
    for start, end in spans:
        labels[start:end] = input_ids[start:end]
    return labels
