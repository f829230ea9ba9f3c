"""With this folder on PYTHONPATH the decoding child of the sandbox crashes or hangs on files that begin with a mark.

No file is known that crashes the decoders of every version; the child that dies here is the real one, by a real signal.
"""

import os
import signal
import time

if "VALLEY_SANDBOX_MEMORY_BYTES" in os.environ:  # the sandbox starts its child with it
    from valley_ray.media import decode

    _frames = decode.frames

    def frames(source, *arguments, **options):
        """As decode.frames, but for the marks."""
        head = source[:8] if isinstance(source, bytes) else source.open("rb").read(8)
        if head.startswith(b"CRASH"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if head.startswith(b"HANG"):
            time.sleep(3600)
        return _frames(source, *arguments, **options)

    decode.frames = frames
