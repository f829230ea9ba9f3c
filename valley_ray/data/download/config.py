"""DownloadConfig: what a user writes for downloads. Knows no Ray, so that it is checked before any starts."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from valley_ray.config import Config
from valley_ray.media.sandbox import SandboxLimits


def _with_id(template: str) -> str:
    if "{id}" not in template:
        raise ValueError(f"must hold {{id}}, which the id of a video replaces, got {template!r}")
    return template


def _below_root(folder: str) -> str:
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
        raise ValueError(f"must be a folder below media_root, got {folder!r}")
    return folder


IdTemplate = Annotated[str, AfterValidator(_with_id)]


class ListConfig(Config):
    """What all kinds of lists have in common."""

    path: Path
    """The list: a local file."""
    folder: Annotated[str, AfterValidator(_below_root)] = ""
    """Folder below `media_root` that its files go to."""
    limit: int | None = Field(default=None, ge=1)
    """Rows that are taken from the top of the list; None: all."""
    headers_file: Path | None = None
    """Lines `Name: value`, sent to the host that a row names and to no host that it leads to; not for pages."""
    cookies_file: Path | None = None
    """Cookies as browsers export them (Netscape's cookies.txt), sent to the domains that they name."""


def _no_headers(source: ListConfig) -> None:
    if source.headers_file is not None:
        raise ValueError("headers_file is not for pages, as yt-dlp would show it to every host; give cookies_file")


class UrlList(ListConfig):
    """Files by their URLs: .txt (one a line), .csv with a header, .jsonl, .json (a list) or .parquet."""

    kind: Literal["urls"]
    method: Literal["http", "page"] = "http"
    """http: the URL is the file. page: the URL is a page that yt-dlp finds a video on."""
    url_key: str = "url"
    """Column of the URL."""
    name_key: str = "name"
    """Column of the file's name below `folder`; where it is empty, made of the id or else of the URL."""
    id_key: str = "id"
    """Column of the row's id; where it is empty, the list's name and the row's number."""
    sha256_key: str = "sha256"
    """Column of the digest that the file must have, hexadecimal; may be empty."""
    size_key: str = "size_bytes"
    """Column of the number of bytes that the file must have; may be empty."""

    @model_validator(mode="after")
    def _check_headers(self) -> "UrlList":
        if self.method == "page":
            _no_headers(self)
        return self


class VatexAnnotations(ListConfig):
    """VATEX annotations: a JSON list whose `videoID` is a YouTube id with a window, `<id>_<start s>_<end s>`."""

    kind: Literal["vatex"]
    page_url: IdTemplate = "https://www.youtube.com/watch?v={id}"
    """Page of a video."""
    name: IdTemplate = "v_{id}.mp4"
    """File name of a video; the default is upstream's, which the records of Valley-Instruct use."""

    @model_validator(mode="after")
    def _check_headers(self) -> "VatexAnnotations":
        _no_headers(self)
        return self


class CategoryList(ListConfig):
    """Jukin-style: a JSON object of lists of videos by category; an API tells where the file of an id is."""

    kind: Literal["categories"]
    api_url: IdTemplate
    """Answers with JSON for an id. Upstream's: https://www.jukinmedia.com/api/public/video/downloadVideo/{id}"""
    api_method: Literal["GET", "POST"] = "GET"
    """Upstream asks with POST."""
    id_key: str = "jmId"
    """Key of the id in a video's object."""
    file_url_key: str = "url"
    """Where the API's answer holds the URL of the file; dots lead into objects and lists, `data.0.url`."""
    name: IdTemplate = "v_{id}.mp4"
    """File name of a video; the default is upstream's."""


class HostLimits(Config):
    """What one host is asked for, over all nodes."""

    concurrency: int = Field(default=4, ge=1)
    """Downloads from a host at once."""
    requests_per_s: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Requests to a host per second, redirects and questions to an API included, on average."""


class RetryConfig(Config):
    """How often and how soon a download is begun again after a failure that may pass."""

    max_attempts: int = Field(default=4, ge=1)
    """Attempts at a file in one run."""
    backoff_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Pause after the first failure, doubled after each one; half of it is drawn at random."""
    max_pause_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Longest pause, whatever a server asks for."""


class DownloadConfig(Config):
    """What is fetched, where it goes and what it may cost."""

    sources: tuple[Annotated[UrlList | VatexAnnotations | CategoryList, Field(discriminator="kind")], ...]
    """Lists of what to fetch, one after the other."""
    media_root: Path
    """Folder of the files, on a file system that all nodes share."""
    ledger_dir: Path | None = None
    """Folder of ledger, clips table and summary; None: `_downloads` below `media_root`."""
    retry_failed: bool = False
    """Try again what failed in an earlier run; files that are there are never fetched again."""
    host_limits: HostLimits = HostLimits()
    """Limits per host."""
    retry: RetryConfig = RetryConfig()
    """Second attempts."""
    num_workers: int | None = Field(default=None, ge=1)
    """Worker processes; None: one per node."""
    downloads_per_worker: int = Field(default=16, ge=1)
    """Downloads that a worker has under way at once."""
    cpus_per_worker: float = Field(default=0.25, ge=0)
    """CPUs that a worker reserves."""
    timeout_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Wall-clock seconds for one file, all attempts of a run together, pauses between them not counted."""
    stall_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds without a byte before an attempt is given up."""
    max_bytes: int = Field(default=2 << 30, ge=1)
    """Largest file, bytes."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects that one request may follow."""
    allow_hosts: tuple[str, ...] | None = None
    """Hosts that URLs and redirects may name; None: any. What yt-dlp finds on an allowed page is not held to it."""
    allow_private_addresses: bool = False
    """Connect to loopback, private and link-local addresses too; for servers of your own."""
    page_format: str = "bv*[height<=480]/b[height<=480]/bv*/b"
    """yt-dlp's format of videos on pages; the default takes pictures without sound, so that nothing must be merged."""
    sandbox: SandboxLimits = SandboxLimits()
    """Time and memory for the look into a file before it counts as there."""

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, sources: tuple[ListConfig, ...]) -> tuple[ListConfig, ...]:
        if not sources:
            raise ValueError("sources is empty; name at least one list, {kind: urls, path: urls.txt}")
        return sources

    def under(self, root: Path) -> "DownloadConfig":
        """The same with relative paths below `root`."""
        sources = tuple(
            source.model_copy(
                update={
                    key: root / path
                    for key in ("path", "headers_file", "cookies_file")
                    if (path := getattr(source, key)) is not None
                }
            )
            for source in self.sources
        )
        ledger_dir = root / self.ledger_dir if self.ledger_dir is not None else None
        return self.model_copy(
            update={"sources": sources, "media_root": root / self.media_root, "ledger_dir": ledger_dir}
        )

    @property
    def ledger_folder(self) -> Path:
        """Folder of ledger, clips table and summary."""
        return self.ledger_dir if self.ledger_dir is not None else self.media_root / "_downloads"
