"""Checks of the machine: ports, Ray's token authentication, disks and shared memory. Starts nothing and joins nothing.

The rules of Ray are those of 2.60 (ray/_private/authentication, ray/_private/services.py and its C++ token loader),
re-told here so that looking costs no import of its core.
"""

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from valley_ray.cli.finding import Finding, Level
from valley_ray.storage import storage_root

PORTS = {
    8000: ("Serve's HTTP port", "give the server another: valley-ray serve --port 8001 (0 for any)"),
    8265: (
        "Ray's dashboard and jobs",
        "if that is your Ray, export RAY_ADDRESS to use it; else `ray start --head --dashboard-port=OTHER`",
    ),
    6379: (
        "Ray's head",
        "if that is your Ray, export RAY_ADDRESS to use it; else `ray start --head --port=OTHER`",
    ),
}

GIB = 1 << 30
MIN_STORAGE_BYTES, LOW_STORAGE_BYTES = GIB, 20 * GIB
MAX_USED = 0.95
"""Ray writes no objects to a disk that is fuller (RAY_local_fs_capacity_threshold)."""
ENOUGH_SHM_BYTES = 10**10
"""Ray takes at most this much shared memory for granted (REQUIRE_SHM_SIZE_THRESHOLD)."""
OBJECT_STORE_SHARE = 0.3
"""Of the memory, by default Ray's object store."""

_TOKEN_COMMAND = "ray get-auth-token --generate > /dev/null; export RAY_AUTH_MODE=token"


def check_ports() -> Iterator[Finding]:
    """Whether the usual ports are free, and else who listens."""
    for port, (what, fix) in PORTS.items():
        if not _is_taken(port):
            yield Finding(f"port {port}", "OK", f"free ({what})")
        else:
            yield Finding(f"port {port}", "WARN", f"taken by {_listener(port)} ({what})", fix)


def check_ray_auth(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether clusters and clients agree on tokens: Ray turns them on by itself on one side only."""
    mode = environment.get("RAY_AUTH_MODE")
    where, token_file, problem = _find_token(environment)
    if problem is not None:
        yield Finding("ray auth", "FAIL", problem, "unset RAY_AUTH_TOKEN_PATH, or write the token there")
    elif mode is None and where is not None:
        text = f"RAY_AUTH_MODE is unset and {where} holds a token: new clusters ask for it, but clients do not send it"
        yield Finding("ray auth", "WARN", text, "export RAY_AUTH_MODE=token in every shell that talks to the cluster")
    elif mode is None:
        text = "RAY_AUTH_MODE is unset and there is no token: `ray start --head` starts a cluster open to everybody"
        yield Finding("ray auth", "WARN", text, _TOKEN_COMMAND)
    elif mode.lower() == "token" and where is not None:
        yield Finding("ray auth", "OK", f"token of {where}")
    elif mode.lower() == "token":
        yield Finding("ray auth", "WARN", "RAY_AUTH_MODE=token, but there is no token to send", _TOKEN_COMMAND)
    elif mode.lower() == "disabled":
        text = "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports runs code on it"
        yield Finding("ray auth", "WARN", text, _TOKEN_COMMAND)
    else:
        text = f"RAY_AUTH_MODE={mode!r} means nothing to Ray, which then takes it for disabled"
        yield Finding("ray auth", "FAIL", text, "export RAY_AUTH_MODE=token")
    if token_file is not None and stat.S_IMODE(token_file.stat().st_mode) & 0o077:
        mode_text = f"{stat.S_IMODE(token_file.stat().st_mode):o}"
        yield Finding("ray auth", "WARN", f"others may read {token_file} (mode {mode_text})", f"chmod 600 {token_file}")


def check_disks() -> Iterator[Finding]:
    """Room where models and runs are kept, and where Ray keeps its files."""
    root = _existing(storage_root())
    free = shutil.disk_usage(root).free
    fix = "free space, or export VALLEY_STORAGE=FOLDER on a larger disk"
    if not os.access(root, os.W_OK):
        yield Finding("storage", "FAIL", f"{root} cannot be written", "export VALLEY_STORAGE=FOLDER that is yours")
    else:
        level: Level = "FAIL" if free < MIN_STORAGE_BYTES else "WARN" if free < LOW_STORAGE_BYTES else "OK"
        text = f"{root} has {free / GIB:.1f} GiB free"
        text += "" if level == "OK" else "; a checkpoint of a 7B model with optimizer takes 80 GiB"
        yield Finding("storage", level, text, None if level == "OK" else fix)
    temporary = _existing(Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))
    usage = shutil.disk_usage(temporary)
    used = 1 - usage.free / usage.total
    text = f"{temporary} has {usage.free / GIB:.1f} GiB free, {used:.0%} used"
    if used > MAX_USED or usage.free < MIN_STORAGE_BYTES:
        text += f"; Ray keeps no objects on a disk over {MAX_USED:.0%}"
        yield Finding(
            "temporary files", "FAIL", text, "remove old Ray sessions in /tmp/ray, or export RAY_TMPDIR=FOLDER"
        )
    else:
        yield Finding("temporary files", "OK", text)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room for Ray's object store, which else is a file in its temporary folder."""
    if not folder.is_dir():
        yield Finding("shared memory", "OK", f"{folder} is absent here; Ray uses its temporary folder")
        return
    free = shutil.disk_usage(folder).free
    wanted = min(OBJECT_STORE_SHARE * _memory_bytes(), ENOUGH_SHM_BYTES)
    text = f"{folder} has {free / GIB:.1f} GiB free"
    if free >= wanted:
        yield Finding("shared memory", "OK", text)
    else:
        text += f" of the {wanted / GIB:.1f} that Ray's object store takes: it will use slower files"
        yield Finding("shared memory", "WARN", text, f"in Docker: --shm-size={wanted / 1e9 * 1.1:.0f}gb")


def _find_token(environment: Mapping[str, str]) -> tuple[str | None, Path | None, str | None]:
    """Ray's token: (where it is, its file, what is wrong); looked for in Ray's order."""
    if environment.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", None, None
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    try:
        has_token = bool(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        has_token = False
    if has_token:
        return str(path), path, None
    return None, None, f"RAY_AUTH_TOKEN_PATH={named} cannot be read or is empty" if named else None


def _is_taken(port: int) -> bool:
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex(("127.0.0.1", port)) == 0


def _listener(port: int) -> str:
    """ "process 123 (python)" where /proc says so and the process may be looked into."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.is_file() else []
        rows = [line.split() for line in lines]
        listening = [row for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port]
        inodes |= {f"socket:[{row[9]}]" for row in listening}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:
            continue
    return "a process that cannot be looked into"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
