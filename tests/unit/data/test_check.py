"""What can be known to go wrong is said before Ray starts, and nothing that is not ours is ever replaced."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from valley_ray.data.check import check_prepare
from valley_ray.data.commit import exclusive
from valley_ray.data.config import PrepareConfig
from valley_ray.data.prepare import prepare
from valley_ray.errors import ValleyError

ROOT = Path(__file__).parents[3]


def config_of(folder: Path, **values: Any) -> PrepareConfig:
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "videos" / "a.mp4").touch()
    return PrepareConfig(**({"sources": ({"path": str(folder / "videos")},), "output": folder / "out"} | values))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"sources": ({"path": "/no/such/file.json"},)}, "/no/such/file.json: there is no such file or folder"),
        ({"sources": ({"path": "/no/such/file", "format": "llava"},)}, "/no/such/file: there is no such file"),
        (
            {"sources": ({"path": "{}/videos", "media_root": "/no/such"},)},
            "media_root=/no/such: there is no such folder",
        ),
        ({"model": Path("/no/such/model")}, "model=/no/such/model: there is no such folder"),
        ({"output": Path("/dev/null/out")}, "choose another output"),
        ({"output": Path("/proc/valley")}, "choose another output"),
    ],
)
def test_mistake_is_one_line_that_says_what_to_do(tmp_path: Path, values: dict[str, Any], wanted: str) -> None:
    if "sources" in values:
        named = [{key: text.format(tmp_path) for key, text in one.items()} for one in values["sources"]]
        values = values | {"sources": named}
    with pytest.raises(ValleyError) as caught:
        check_prepare(config_of(tmp_path, **values))
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_configuration_passes_and_a_second_writer_does_not(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    check_prepare(config)
    check_prepare(config)
    with exclusive(config.output), pytest.raises(ValleyError, match="another pipeline is writing"):
        check_prepare(config)


@pytest.mark.parametrize("name", ["clips", "samples"])
def test_folder_with_anybodys_files_is_not_written_over(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path)
    (config.output / name).mkdir(parents=True)
    (config.output / name / "part-00000.parquet").touch()
    check_prepare(config)
    (config.output / name / "holiday.mp4").touch()
    with pytest.raises(ValleyError, match=r"holiday\.mp4 was not written by an earlier run"):
        check_prepare(config)
    with pytest.raises(ValleyError, match=r"holiday\.mp4 was not written by an earlier run"):
        prepare(config)
    assert (config.output / name / "holiday.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--input", "nope", "--output", "out"], "nope: there is no such file or folder"),
        (["--input", "."], "give --output DIR"),
        (["--input", ".", "--media-root", "nope", "--output", "out"], "media_root={}/nope: there is no such folder"),
    ],
)
def test_job_says_so_in_one_line_without_starting_ray(tmp_path: Path, arguments: list[str], wanted: str) -> None:
    without_ray = "import runpy, sys; sys.modules['ray'] = None; del sys.argv[0]; "
    program = without_ray + "runpy.run_path(sys.argv[0], None, '__main__')"
    command = [sys.executable, "-c", program, str(ROOT / "jobs" / "prepare.py"), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    [line] = ended.stderr.splitlines()
    assert line.startswith("prepare: error: ")
    assert wanted.format(tmp_path) in line
