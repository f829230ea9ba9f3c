"""A model folder → a short text that is another one where visual tokens made with it may be others.

Opens no weights: 13 GB would take minutes to read.
"""

import hashlib
from pathlib import Path

from valley_ray.model.folders import base_folder

_READ = ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json")
_WEIGHTS = ("*.safetensors", "*.bin")


def weights_version(folder: Path) -> str:
    """Digest of a folder's settings, and of the names, sizes and times of its weight files; of an adapter's base too.

    Two copies of a model with other times are two versions: that costs what is cached, never a wrong answer.
    """
    digest = hashlib.sha256()
    base = base_folder(folder)
    for one in (folder, *([base] if base is not None else [])):
        for name in _READ:
            if (one / name).is_file():
                digest.update(name.encode() + b"\0" + (one / name).read_bytes() + b"\0")
        for path in sorted(path for pattern in _WEIGHTS for path in one.glob(pattern)):
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]
