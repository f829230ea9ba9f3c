"""Where the outside parity set lies and how its files encode ids; the set's content is never named here."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from valley_ray.media.preprocess import Crop

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


def crop_of(image_processor: dict[str, Any]) -> Crop:
    """The crop that an image processor's settings ask for; its numbers of PIL's filters are 2 and 3."""
    resample: Literal["bilinear", "bicubic"] = "bilinear" if image_processor["resample"] == 2 else "bicubic"
    if image_processor["do_center_crop"]:
        size, short_side = image_processor["crop_size"]["height"], image_processor["size"]["shortest_edge"]
        return Crop(size=size, short_side=short_side, resample=resample, corner="floored")
    assert image_processor["size"]["height"] == image_processor["size"]["width"]
    return Crop(size=image_processor["size"]["height"], resample=resample, fit="stretch")
