"""Checks of what is installed: Python, packages, video decoders, torch with its GPUs, DeepSpeed."""

import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from valley_ray.cli.finding import Finding, Level
from valley_ray.errors import ConfigError, ValleyError

if TYPE_CHECKING:
    from valley_ray.media.decode import Backend

MIN_PYTHON = (3, 11)
SHOWN_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft", "av")

_DEEPSPEED_OPS = """
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.ops.op_builder.builder import probe_is_compatible
ops = {name: op for name, op in ALL_OPS.items() if not name.endswith("not_implemented")}
print(len(ops), *sorted(name for name, op in ops.items() if probe_is_compatible(op, False)))
"""
"""In a process of its own: DeepSpeed logs a lot, and its probes may start compilers."""

_DEEPSPEED_TIMEOUT_S = 180


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        yield Finding("python", "FAIL", text, f"make PYTHON=python{needed} install (needs {needed} or newer)")
    else:
        yield Finding("python", "OK", text)


def check_packages() -> Iterator[Finding]:
    """Versions against the ranges that valley_ray was tested with (its own metadata); a line for each outside."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("valley-ray") or []]
    except metadata.PackageNotFoundError:
        yield Finding("packages", "FAIL", "valley-ray is not installed in this environment", "make install")
        return
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    versions = {one.name: _version(one.name) for one in needed}
    num_fit = 0
    for one in needed:
        version = versions[one.name]
        fix = f"pip install '{one.name}{one.specifier}'"
        if version is None:
            yield Finding("packages", "FAIL", f"{one.name} is missing", fix)
        elif not one.specifier.contains(version, prereleases=True):
            yield Finding("packages", "WARN", f"{one.name} {version} is outside the tested {one.specifier}", fix)
        else:
            num_fit += 1
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN_PACKAGES if versions.get(name))
    yield Finding("packages", "OK", f"{num_fit} of {len(needed)} are in the tested ranges ({shown})")


def check_decoders() -> Iterator[Finding]:
    """Each decoder reads a small video that is made here, in the child process that decoding always uses."""
    from valley_ray.media.decode import Backend

    with tempfile.TemporaryDirectory(prefix="valley-doctor-") as folder:
        clip = Path(folder) / "clip.mp4"
        try:
            codec = _write_clip(clip)
        except (ImportError, OSError, ValueError) as error:
            yield Finding("pyav", "FAIL", f"cannot write a video ({error})", "pip install --force-reinstall av")
            return
        for backend in get_args(Backend):
            yield _try_decoder(backend, clip, codec)


def check_torch() -> Iterator[Finding]:
    """torch, and the GPUs that it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "FAIL", f"cannot be imported ({error})", "make clean install")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            yield Finding("gpu", "OK", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bfloat16}")
        yield Finding("torch", "OK", f"{torch.__version__} with CUDA {torch.version.cuda}")
    elif not _has_nvidia_driver():
        text = f"{torch.__version__}, no GPU: enough for small models; one of 7B wants a GPU"
        yield Finding("torch", "OK", text)
    elif torch.version.cuda is None:
        fix = "pip install torch from https://download.pytorch.org/whl/cu128 (or your CUDA version)"
        yield Finding("torch", "WARN", f"{torch.__version__} is a CPU build, but this machine has an NVIDIA GPU", fix)
    else:
        fix = "compare the driver's CUDA version in `nvidia-smi` with torch's; check CUDA_VISIBLE_DEVICES"
        yield Finding("torch", "WARN", f"{torch.__version__} (CUDA {torch.version.cuda}) sees no GPU", fix)


def check_deepspeed() -> Iterator[Finding]:
    """Which of DeepSpeed's compiled ops could be built here; training as configured here needs none of them."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _DEEPSPEED_OPS],
            capture_output=True,
            text=True,
            timeout=_DEEPSPEED_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "deepspeed", "WARN", f"its ops were not listed within {_DEEPSPEED_TIMEOUT_S} s", "run `ds_report`"
        )
        return
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("deepspeed", "FAIL", f"cannot be imported ({reason})", "pip install --force-reinstall deepspeed")
        return
    num_ops, *names = ended.stdout.strip().splitlines()[-1].split()
    text = f"{_version('deepspeed')}, {len(names)} of {num_ops} ops can be built here ({', '.join(names) or 'none'})"
    yield Finding("deepspeed", "OK", f"{text}; none is needed")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write_clip(path: Path) -> str:
    """A video of 8 frames; returns its codec: H.264 where this FFmpeg has it, else MPEG-4."""
    import av
    import numpy as np

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for index in range(8):
            grey = np.full((64, 64, 3), 30 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return codec


def _try_decoder(backend: "Backend", clip: Path, codec: str) -> Finding:
    from valley_ray.media.sampling import FrameSampling
    from valley_ray.media.sandbox import Sandbox

    package = {"pyav": "av"}.get(backend, backend)
    # The default decoder has to work; the other only where somebody asks for it.
    level: Level = "FAIL" if backend == "pyav" else "WARN"
    try:
        with Sandbox(backend=backend) as sandbox:
            frames = sandbox.frames(clip, FrameSampling(num_frames=3)).frames_THWC
    except ConfigError as error:
        if backend != "pyav" and platform.machine().lower() not in ("x86_64", "amd64"):
            return Finding(
                backend, "OK", f"not installed; it has no wheel for {platform.machine()}, pyav does its work"
            )
        return Finding(backend, level, str(error), f"pip install {package}")
    except ValleyError as error:
        return Finding(
            backend, level, f"{package} {_version(package)}: {error}", f"pip install --force-reinstall {package}"
        )
    brightness = [int(frame.mean()) for frame in frames]
    if sorted(brightness) != brightness or brightness[0] == brightness[-1]:
        text = f"{package} {_version(package)} gave wrong frames of a made video ({brightness=})"
        return Finding(backend, level, text, f"pip install --force-reinstall {package}")
    return Finding(backend, "OK", f"{package} {_version(package)} reads a video made here ({codec})")


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").is_file()
