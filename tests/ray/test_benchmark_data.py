"""What benchmark_data says of the platform is measured over the same files, and nothing is decoded twice."""

from pathlib import Path

import pytest
from clips import write_clip

from valley_ray.benchmarks.prepare_cost import PrepareCost, many_videos, prepare_numbers

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_every_number_is_there_and_a_second_epoch_decodes_nothing(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for seed in range(3):
        write_clip(tmp_path / "videos" / f"{seed}.mp4", seed=seed)
    config = PrepareCost(videos=tmp_path / "videos", clips=tmp_path, num_videos=32, num_rounds_prepare=1)
    said: list[str] = []
    numbers = prepare_numbers(config, say=said.append)
    assert len(said) == 2, "a heading and a line per round"
    assert numbers["second_epoch_decodes"] == 0
    for name in ("ray_cpu_efficiency", "ray_cpu_efficiency_with_servers", "ray_wall_vs_pool"):
        assert 0 < numbers[name] < 10
    medians = numbers["prepare_medians"]
    assert medians["num_videos"] == 32
    assert all(medians[name] > 0 for name in ("loop_cpu_s", "driver_cpu_s", "worker_cpu_s", "decoder_cpu_s"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "videos"]


def test_the_set_is_made_once_and_again_for_another_number(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mkv"):
        (tmp_path / "videos" / name).write_text(name)
    config = PrepareCost(videos=tmp_path / "videos", num_videos=33)
    paths = many_videos(config, tmp_path / "many")
    assert [path.read_text() for path in paths[:3]] == ["a.mp4", "b.mkv", "a.mp4"]
    assert len(set(paths)) == 33
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in many_videos(config, tmp_path / "many")] == times
    other = config.model_copy(update={"num_videos": 32})
    assert many_videos(other, tmp_path / "many") == paths[:32]
    assert len(list((tmp_path / "many").iterdir())) == 32
