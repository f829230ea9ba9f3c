"""API keys: a file and an environment variable → digests; a request's Authorization header → who asks.

Only digests of keys go on to replicas, so that neither Ray's state nor a log ever holds a key.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from valley_ray.errors import ConfigError
from valley_ray.serve.refusals import UnauthorizedError

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "VALLEY_API_KEYS"
"""Environment variable with keys, separated by commas or white space."""

_LEAST_CHARACTERS = 16
_KEY = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Caller:
    """Who a request comes from."""

    name: str
    """As the access log shows it: the name of the key, or "anyone" on a server without keys."""
    owner: str
    """Stable mark of what is theirs (uploaded files): digest of the key, "" on a server without keys."""


ANYONE = Caller("anyone", "")


@dataclass(frozen=True)
class Keys:
    """The keys of a server; none: everybody may ask."""

    names: tuple[tuple[str, str], ...] = ()
    """(digest, name) of each key; digests are SHA-256 in hex."""

    def __bool__(self) -> bool:
        return bool(self.names)

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this Authorization header; raises UnauthorizedError.

        Every digest is compared, each in constant time: how long it takes tells nothing about any key.
        """
        if not self.names:
            return ANYONE
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("no API key; send the header 'Authorization: Bearer KEY'")
        digest = _digest(key.strip())
        found = [Caller(name, known) for known, name in self.names if hmac.compare_digest(known, digest)]
        if not found:
            raise UnauthorizedError("unknown API key; ask the operator of this server for one")
        return found[0]


def read_keys(file: Path | None) -> Keys:
    """Keys of `file` (one a line: `KEY` or `NAME KEY`; # starts a comment) and of $VALLEY_API_KEYS.

    Raises ConfigError: a file that cannot be read or holds no key, a key that is short or has odd characters, or one
    that stands there twice.
    """
    entries = list(_of_file(file)) if file is not None else []
    words = re.split(r"[,\s]+", os.environ.get(KEYS_VARIABLE, ""))
    entries += [(f"${KEYS_VARIABLE} {i}", "", word) for i, word in enumerate(filter(None, words), start=1)]
    names: dict[str, str] = {}
    for place, name, key in entries:
        if len(key) < _LEAST_CHARACTERS or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{place}: a key has at least {_LEAST_CHARACTERS} characters, printable ASCII without spaces; "
                "make one with `openssl rand -hex 24`"
            )
        digest = _digest(key)
        if digest in names:
            raise ConfigError(f"{place}: the key stands there twice; remove one of them")
        names[digest] = name or f"key-{digest[:8]}"
    return Keys(tuple(names.items()))


def check_exposure(host: str, keys: Keys, *, allow_no_keys: bool) -> None:
    """Raise ConfigError where anybody in the network could ask a server without keys."""
    if keys or allow_no_keys or is_loopback(host):
        return
    raise ConfigError(
        f"listening on {host} without API keys would answer anybody in the network: set api_keys_file or "
        f"${KEYS_VARIABLE}, listen on 127.0.0.1 (http_options.host), or say allow_no_keys: true"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _of_file(file: Path) -> Iterator[tuple[str, str, str]]:
    try:
        text, mode = file.read_text("utf-8"), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file {file}: cannot be read ({error}); check the path") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("%s: other users of this machine can read the API keys; chmod 600 it", file)
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if len(words) > 2:
            raise ConfigError(f"{file}:{number}: expected KEY or NAME KEY, got {len(words)} words")
        if words:
            entries.append((f"{file}:{number}", words[0] if len(words) == 2 else "", words[-1]))
    if not entries:
        raise ConfigError(f"api_keys_file {file} holds no key; write one a line")
    yield from entries


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
