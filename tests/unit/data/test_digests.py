"""Equal bytes are told by their digest, and only files that may be equal are read."""

import os
from pathlib import Path

import pytest

from valley_ray.data.digests import _digests_here


def test_folder_of_frames_has_the_digest_of_its_images_by_name(tmp_path: Path) -> None:
    for folder, names in (("a", "012"), ("b", "abc"), ("c", "021")):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, "xyz", strict=True):
            (tmp_path / folder / f"{name}.png").write_text(content)
    (tmp_path / "a" / "notes.txt").write_text("not a frame")
    (tmp_path / "whole.mp4").write_text("xyz")
    a, b, c, whole = _digests_here([[str(tmp_path / name)] for name in ("a", "b", "c", "whole.mp4")])
    assert a == b == whole
    assert "" != c != a, "another order of the same images is another clip"


@pytest.mark.timeout(20)
def test_what_cannot_be_read_to_an_end_has_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert _digests_here([[str(tmp_path / "pipe.mp4")], [str(tmp_path / "gone.mp4")], ["/dev/zero"]]) == ["", "", ""]
