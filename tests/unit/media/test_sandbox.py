"""The killable child: same frames, and a bad file costs itself only."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import av
import numpy as np
import pytest
from media_files import write_clip

from valley_ray.errors import (
    DecodeCrashError,
    DecodeMemoryError,
    DecodeTimeoutError,
    MediaLimitError,
    NotMediaError,
    SamplingError,
)
from valley_ray.media import decode
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox, SandboxLimits
from valley_ray.media.source import MediaInfo


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4")


@pytest.fixture(scope="module")
def big_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "big.mp4"
    return write_clip(path, size_wh=(2048, 2048), num_frames=3, options={"preset": "ultrafast"})


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_frames_equal_those_decoded_in_process(sandbox, clip):
    for source in (clip, clip.read_bytes()):
        for crop in (None, Crop(size=16, short_side=20), Crop(size=16, fit="stretch"), Crop(size=16, fit="keep")):
            got = sandbox.frames(source, FrameSampling(fps=7), crop=crop)
            want = decode.frames(source, FrameSampling(fps=7), crop=crop)
            np.testing.assert_array_equal(got.frames_THWC, want.frames_THWC)
            np.testing.assert_array_equal(got.pts_seconds, want.pts_seconds)
            assert got.info == want.info
            assert got.info is not None
    assert sandbox.probe(clip) == decode.probe(clip)


def test_errors_come_back_as_their_class(sandbox, clip, tmp_path):
    (tmp_path / "b.mp4").write_bytes(b"plain text\n" * 100)
    with pytest.raises(NotMediaError, match=r"^b\.mp4: "):
        sandbox.frames(tmp_path / "b.mp4", FrameSampling())
    with pytest.raises(SamplingError, match=r"^lecture: "):
        sandbox.frames(clip, FrameSampling(start_s=99.0), name="lecture")


def test_bad_files_leave_the_child_running(sandbox, clip):
    sandbox.frames(clip, FrameSampling())
    before = sandbox.child_pid
    with pytest.raises(NotMediaError):
        sandbox.frames(b"junk" * 100, FrameSampling())
    sandbox.frames(clip, FrameSampling())
    assert sandbox.child_pid == before


def test_threads_share_a_sandbox(sandbox, clip):
    samplings = [FrameSampling(num_frames=number) for number in range(1, 13)]
    with ThreadPoolExecutor(4) as pool:
        videos = list(pool.map(lambda sampling: sandbox.frames(clip, sampling), samplings))
    assert [len(video) for video in videos] == list(range(1, 13))


def test_hanging_child_is_killed_and_replaced(clip):
    with Sandbox(limits=SandboxLimits(timeout_s=1.0)) as sandbox:
        sandbox.probe(clip)
        hung = sandbox.child_pid
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(DecodeTimeoutError, match=r"^a\.mp4: .* 1 s"):
            sandbox.frames(clip, FrameSampling())
        assert wait_until_gone(hung)
        assert len(sandbox.frames(clip, FrameSampling())) == 8


def test_hang_while_the_file_is_being_sent_times_out(clip):
    with Sandbox(limits=SandboxLimits(timeout_s=1.0)) as sandbox:
        sandbox.probe(clip)
        os.kill(sandbox.child_pid, signal.SIGSTOP)
        with pytest.raises(DecodeTimeoutError):
            sandbox.frames(bytes(4 << 20), FrameSampling(), name="large")


@pytest.mark.parametrize(
    ("number", "error_class"), [(signal.SIGSEGV, DecodeCrashError), (signal.SIGKILL, DecodeMemoryError)]
)
def test_crashing_child_is_named_and_replaced(clip, number, error_class):
    with Sandbox() as sandbox:
        sandbox.probe(clip)
        pid = sandbox.child_pid
        os.kill(pid, signal.SIGSTOP)  # the request below is in flight when the child dies
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(sandbox.frames, clip, FrameSampling())
            time.sleep(0.5)
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)
            with pytest.raises(error_class, match=r"^a\.mp4: "):
                request.result(timeout=30)
        assert len(sandbox.frames(clip, FrameSampling())) == 8


def test_child_killed_between_requests_costs_no_file(clip):
    with Sandbox() as sandbox:
        sandbox.probe(clip)
        os.kill(sandbox.child_pid, signal.SIGKILL)
        assert wait_until_gone(sandbox.child_pid)
        assert len(sandbox.frames(clip, FrameSampling())) == 8


def test_memory_limit_costs_the_file_only(clip, big_clip):
    with Sandbox(limits=SandboxLimits(memory_bytes=24 << 20)) as sandbox:
        with pytest.raises(DecodeMemoryError, match=r"^big\.mp4: "):
            sandbox.frames(big_clip, FrameSampling())
        assert len(sandbox.frames(clip, FrameSampling())) == 8
    with Sandbox() as sandbox:
        assert len(sandbox.frames(big_clip, FrameSampling(), crop=Crop())) == 8


def test_frames_of_8192_pixels_are_refused_by_their_header(sandbox, tmp_path):
    path = tmp_path / "bomb.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width = stream.height = 8192
        for packet in (*stream.encode(av.VideoFrame(8192, 8192, "yuv420p")), *stream.encode(None)):
            container.mux(packet)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(MediaLimitError, match="8192x8192"):
        sandbox.frames(path, FrameSampling())


INFO = asdict(MediaInfo("video", 1, 25.0, 1, 1, 0.04, 0, "h264", 1, 0))


def test_a_well_formed_reply_is_taken(clip):
    reply = {"shape": [1, 1, 1, 3], "pts_seconds": [0.5], "info": INFO}
    with Sandbox(command=send_reply(reply, b"abc")) as sandbox:
        video = sandbox.frames(clip, FrameSampling())
    assert video.frames_THWC.tobytes() == b"abc"
    assert video.info == MediaInfo(**INFO)


def send_reply(header, body=b""):
    """A child that answers its first request with these bytes."""
    ready, text = b'{"ready": true}', json.dumps(header).encode() if isinstance(header, dict) else header
    replies = struct.pack("<I", len(ready)) + ready, struct.pack("<I", len(text)) + text + body
    script = (
        "import sys, time; out = sys.stdout.buffer\n"
        f"out.write({replies[0]!r}); out.flush(); sys.stdin.buffer.read(4)\n"
        f"out.write({replies[1]!r}); out.flush(); time.sleep(60)"
    )
    return (sys.executable, "-S", "-c", script)


@pytest.mark.parametrize(
    "reply",
    [
        {"shape": [1 << 20, 1 << 20, 1 << 20, 3], "pts_seconds": []},
        {"shape": [-1, 2, 2, 3], "pts_seconds": []},
        {"shape": "many"},
        {"pts_seconds": [0.0], "info": INFO},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0, 1.0], "info": INFO},
        {"shape": [1, 1, 1, 3], "pts_seconds": {"0": 0.0}, "info": INFO},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0]},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": [1]},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": INFO | {"width": -1}},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": INFO | {"height": 10**40}},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": INFO | {"fps": float("nan")}},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": INFO | {"codec": "x" * 1000}},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": INFO | {"kind": "tape"}},
        {"shape": [1, 1, 1, 3], "pts_seconds": [0.0], "info": INFO | {"more": 1}},
        {"error": {"code": "no_such_code", "message": "a.mp4: odd"}},
        b"[]",
        b"not json",
    ],
)
def test_nonsense_from_the_child_is_a_crash_of_that_file(clip, reply):
    with (
        Sandbox(command=send_reply(reply, bytes(3))) as sandbox,
        pytest.raises(DecodeCrashError, match=r"^a\.mp4: "),
    ):
        sandbox.frames(clip, FrameSampling())


def test_child_that_does_not_start_says_so(clip):
    command = (sys.executable, "-c", "raise SystemExit(3)")
    with Sandbox(command=command) as sandbox, pytest.raises(DecodeCrashError, match="did not start"):
        sandbox.probe(clip)


def test_close_ends_the_child_and_refuses_more(clip):
    sandbox = Sandbox()
    sandbox.probe(clip)
    pid = sandbox.child_pid
    sandbox.close()
    assert not is_running(pid)
    with pytest.raises(ValueError, match="closed"):
        sandbox.probe(clip)


@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_child_dies_with_its_parent(clip, ending):
    script = (
        "import os, pathlib\n"
        "from valley_ray.media.sandbox import Sandbox\n"
        "sandbox = Sandbox()\n"
        f"sandbox.probe(pathlib.Path({str(clip)!r}))\n"
        "print(sandbox.child_pid, flush=True)\n"
        f"{ending}\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert wait_until_gone(int(ended.stdout))


def test_child_outlives_the_thread_that_started_it(clip):
    with Sandbox() as sandbox:
        thread = threading.Thread(target=sandbox.probe, args=(clip,))
        thread.start()
        thread.join()
        pid = sandbox.child_pid
        sandbox.probe(clip)
        assert sandbox.child_pid == pid


def test_parent_loads_no_decoder():
    script = (
        "import sys, valley_ray.media.sandbox\n"
        "print([name for name in ('av', 'decord', 'PIL', 'torch', 'ray') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() == "[]"
