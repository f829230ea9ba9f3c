"""FrameSampler without Serve: the decoder that the configuration names reads the videos."""

import asyncio
from pathlib import Path

import pytest
from PIL import Image

from valley_ray.errors import CorruptMediaError
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.protocol import MediaRef
from valley_ray.serve.sampler import FrameSampler


def test_the_named_decoder_reads_the_videos(tiny_valley: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    pictures = [Image.new("RGB", (32, 32), (60 * number, 0, 0)) for number in range(4)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    media = MediaRef(key="k", kind="video", name="a.gif", path=str(path))
    by_pyav = FrameSampler(ServeConfig(model=tiny_valley))
    assert len(asyncio.run(by_pyav.frames(media, FrameSampling(num_frames=4), "")).frames) == 4
    by_decord = FrameSampler(ServeConfig(model=tiny_valley, video_decoder="decord"))
    with pytest.raises(CorruptMediaError, match="decord cannot read it"):  # it reads no GIF
        asyncio.run(by_decord.frames(media, FrameSampling(num_frames=4), ""))


def test_frames_of_a_folder_are_prepared_like_images(tiny_valley: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(tmp_path / "frames" / f"{number}.png")
    sampler = FrameSampler(ServeConfig(model=tiny_valley))
    folder = MediaRef(key="f", kind="video", name="frames", path=str(tmp_path / "frames"))
    image = MediaRef(key="i", kind="image", name="2.png", path=str(tmp_path / "frames" / "2.png"))
    frames, picture = (
        asyncio.run(sampler.frames(one, FrameSampling(num_frames=3), "")).frames for one in (folder, image)
    )
    assert len(frames) == 3
    assert (frames[2] == picture[0]).all()
