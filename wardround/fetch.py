"""Public data from their publishers, each file checked against a pinned SHA-256 before it is put in place."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import httpx

from shared.config import nearest
from shared.errors import ConfigurationError, ConnectionFailedError, DataError
from shared.files import storage_errors, write_atomic

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a task's files come from, and what they are: file name -> SHA-256 (hex)."""

    url: str
    page: str
    licence: str
    files: dict[str, str]


SOURCES = {
    "heart-disease": Source(
        url="https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease",
        page="https://archive.ics.uci.edu/dataset/45/heart+disease",
        licence="CC BY 4.0; name the investigators: Janosi, Steinbrunn, Pfisterer, Detrano",
        files={
            "processed.cleveland.data": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
            "processed.hungarian.data": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
            "processed.switzerland.data": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
            "processed.va.data": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
        },
    )
}


def fetch_data(task: str, folder: Path, *, client: httpx.Client | None = None) -> Path:
    """The folder with the task's files; those already there and right are not downloaded again.

    Args:
        client: carries the requests; a plain one by default.

    Raises:
        ConfigurationError: no public data are known for the task.
        ConnectionFailedError: no network; it says what to download from where, and where to put it.
        DataError: a file is not the one that was pinned.
    """
    source = SOURCES.get(task)
    if source is None:
        raise ConfigurationError(f"no public data are known for task {task!r}{nearest(task, list(SOURCES))}", f"known: {', '.join(SOURCES)}")
    with storage_errors(folder, "make the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    missing = {name: digest for name, digest in source.files.items() if not _is_right(folder / name, digest)}
    with client or httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=True) as session:
        for name, digest in missing.items():
            write_atomic(folder / name, _download(session, source, name, digest, folder))
    return folder


def _is_right(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _download(session: httpx.Client, source: Source, name: str, digest: str, folder: Path) -> bytes:
    url = f"{source.url}/{name}"
    try:
        response = session.get(url)
        response.raise_for_status()
    except httpx.HTTPError as error:
        wanted = ", ".join(source.files)
        raise ConnectionFailedError(
            f"{url}: could not be downloaded ({type(error).__name__})",
            f"on a machine with a network, get {wanted} from {source.page} and put them into {folder}",
        ) from error
    found = hashlib.sha256(response.content).hexdigest()
    if found != digest:
        raise DataError(
            f"{url}: expected the file with SHA-256 {digest[:16]}..., got {found[:16]}...",
            "the publisher changed it, or something on the way did; do not use it",
        )
    return response.content
