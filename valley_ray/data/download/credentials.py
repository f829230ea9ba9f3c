"""The user's own headers and cookies: read once by the driver, shown only to whom they belong, kept out of messages."""

import http.cookiejar
import re
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from valley_ray.data.download.config import ListConfig
from valley_ray.errors import ConfigError

_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*)")


@dataclass(frozen=True)
class Credentials:
    """What goes with the requests of one list."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """For the host that a row names."""
    cookies: str = field(default="", repr=False)
    """Text of a cookies.txt."""


def read_credentials(source: ListConfig) -> Credentials:
    """Read the files that a list names; raises ConfigError where one is missing or does not read as it should."""
    headers = {}
    if source.headers_file is not None:
        for number, line in enumerate(_read(source.headers_file, "headers_file").splitlines(), 1):
            match = _HEADER.fullmatch(line.strip())
            if match is None and line.strip() and not line.startswith("#"):
                raise ConfigError(f"headers_file {source.headers_file}, line {number}: must read `Name: value`")
            if match is not None:
                headers[match[1]] = match[2]
    cookies = _read(source.cookies_file, "cookies_file") if source.cookies_file is not None else ""
    try:
        cookie_jar(cookies)
    except http.cookiejar.LoadError as error:
        raise ConfigError(
            f"cookies_file {source.cookies_file} is no Netscape cookies.txt; export it again from a browser"
        ) from error
    return Credentials(headers, cookies)


def cookie_jar(text: str) -> http.cookiejar.CookieJar:
    """The cookies of a cookies.txt; raises http.cookiejar.LoadError where it is none."""
    jar = http.cookiejar.MozillaCookieJar()
    if text:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
            file.write(text)
            file.flush()
            jar.load(file.name, ignore_discard=True, ignore_expires=True)
    for cookie in jar:
        # How exports of browsers write that a cookie lasts as long as the session.
        cookie.expires = cookie.expires or None
    return jar


def headers_for(credentials: Credentials, jar: http.cookiejar.CookieJar, url: str) -> Callable[[str], dict[str, str]]:
    """What goes with a request to a URL: headers to the host of `url` alone, cookies to the domains they name."""
    own = _site(url)

    def of(target: str) -> dict[str, str]:
        request = urllib.request.Request(target)
        jar.add_cookie_header(request)
        cookie = request.get_header("Cookie")
        headers = dict(credentials.headers) if _site(target) == own else {}
        return headers | ({"Cookie": cookie} if cookie else {})

    return of


def _site(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={str(path)!r} cannot be read ({error}); check the path") from error
