"""Where glibc takes the memory of an activation from, in a process of its own."""

import subprocess
import sys

import pytest

NUM_MAPPED = """
import ctypes, sys, torch
from valley_ray.engine.memory import keep_freed
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd more".split()]
    _fields_[-1] = ("more", ctypes.c_size_t * 5)
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Counts
if sys.argv[1] == "keep":
    keep_freed()
before = libc.mallinfo2().hblks
activation = torch.empty(28 << 20, dtype=torch.uint8)
weights = torch.empty(40 << 20, dtype=torch.uint8)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
@pytest.mark.parametrize(("word", "expected"), [("as it is", 2), ("keep", 1)])
def test_an_activation_comes_from_the_heap_which_keeps_it_and_weights_from_the_system(word: str, expected: int) -> None:
    done = subprocess.run([sys.executable, "-c", NUM_MAPPED, word], capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected
