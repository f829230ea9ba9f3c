"""What the C library does with memory that computations give back. Does nothing elsewhere than under glibc."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_LARGEST_BYTES = 32 << 20
"""Larger blocks, such as weights, go back to the system at once, as before."""

KEEP_FREED_VARIABLES = {"MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES), "MALLOC_MMAP_THRESHOLD_": str(_LARGEST_BYTES)}
"""The same for a process that is started with this environment."""


def keep_freed() -> None:
    """Keep what the heap gets back, up to 256 MiB, for the whole process.

    glibc returns every activation of a layer to the system, which then clears the pages for the next layer: four of
    five page faults, and an eighth of the CPU time of a prompt, on a LLaMA of 58 million parameters
    (docs/measurements.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
