"""Downloads: data sets of the Hugging Face Hub through huggingface_hub, other files by requests.

A file of the Hub arrives in NAME.VERSION.part, where a later attempt resumes; VERSION is from the
file's ETag. huggingface_hub's hf_hub_download cannot be used for this: it deletes what arrived when
it is interrupted, and compares a file's size but not its SHA-256.
"""

from __future__ import annotations

import glob
import io
import queue
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import requests

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import sha256_of, sync

MAX_PARALLEL: Final = 4  # more downloads at a time do not fill a home line faster
TIMEOUT_S: Final = (10, 30)  # limits for connecting and for the next bytes
BLOCK_BYTES: Final = 1 << 16  # bytes between two reports of progress

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A file on the web and its path on this machine."""

    url: str
    path: Path
    check: Callable[[Path], object]  # raises DataError unless the file is of the expected kind
    on_hub: bool  # whether the URL is one of the Hugging Face Hub
    size: int | None = None  # bytes, if known
    sha256: str | None = None  # checksum, if known, of a file that is not on the Hub


class _StoppedError(Exception):
    """Another download failed, or the user pressed Ctrl-C."""


class _Part(io.BufferedWriter):
    """An incomplete file, opened for appending, that reports the bytes written to it."""

    def __init__(self, path: Path, advance: Callable[[int], None], stop: threading.Event) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._advance, self._stop = advance, stop
        advance(self.tell())

    def write(self, block: Any) -> int:
        if self._stop.is_set():
            raise _StoppedError
        written = super().write(block)
        self._advance(written)
        return written


def hub_url(dataset: str, name: str) -> str:
    """The URL of a file of a data set on the Hugging Face Hub, or on the mirror in HF_ENDPOINT."""
    from huggingface_hub import hf_hub_url  # imported late, as it takes a third of a second

    url: str = hf_hub_url(dataset, name, repo_type="dataset")
    return url


def hub_listing(dataset: str, folder: str) -> list[tuple[str, int]]:
    """The names in a folder of a data set on the Hub, with their sizes in bytes; DataError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(dataset, folder, repo_type="dataset"))
    except (HTTPError, OSError, ValueError) as e:  # ValueError: an answer that is not JSON
        raise DataError(
            f"cannot list {folder} of the data set {dataset} on the Hugging Face Hub "
            f"({_reason(e)}); try again with a network, or get its files by hand and name their "
            f"folder with --from"
        ) from e
    return [(Path(e.path).name, e.size) for e in entries if isinstance(e, RepoFile)]


def download_all(remotes: Sequence[Remote], advance: Callable[[int], None]) -> None:
    """Gets the files that are missing, a few at a time; DataError says what to do by hand.

    advance: called with the bytes that have arrived since its last call, from several threads.
    """
    waiting: queue.SimpleQueue[Remote] = queue.SimpleQueue()
    for remote in remotes:
        waiting.put(remote)
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                download(waiting.get_nowait(), advance, stop)
            except queue.Empty:
                return
            except BaseException as e:  # the main thread raises it
                results.put(e)
            else:
                results.put(None)

    # Daemons, so that Ctrl-C does not wait for the network. A part that is cut anywhere is a
    # beginning of its file all the same.
    for _ in range(min(MAX_PARALLEL, len(remotes))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in remotes:
            if (error := results.get()) is not None:
                raise error
    finally:
        stop.set()


def download(
    remote: Remote,
    advance: Callable[[int], None] = lambda count: None,
    stop: threading.Event | None = None,
) -> None:
    """Gets a file unless it is there; it gets its name only when it is complete and checked."""
    from huggingface_hub.errors import HTTPError

    path = remote.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_there(remote):
            advance(path.stat().st_size)
            return
        get = _get_from_hub if remote.on_hub else _get_from_elsewhere
        part, sha256 = get(remote, advance, stop or threading.Event())
        try:
            _check(part, sha256, remote)
        except DataError as e:
            part.unlink()
            raise DataError(f"{remote.url}: what came is not that file: {e}") from e
        sync(part)
        part.replace(path)
    except (HTTPError, OSError) as e:
        if isinstance(e, OSError) and e.strerror:
            raise DataError(
                f"cannot write {path}: {e.strerror}; make room or choose another --out"
            ) from e
        raise DataError(
            f"cannot get {remote.url} ({_reason(e)}); give the same command again where there is a "
            f"network, or get that file by hand and put it here: {path}"
        ) from e


def _is_there(remote: Remote) -> bool:
    """True if the file exists with the size and the kind of content that it should have."""
    if not remote.path.exists() or remote.size not in (None, remote.path.stat().st_size):
        return False
    try:
        remote.check(remote.path)
    except DataError:
        return False
    return True


def _get_from_hub(
    remote: Remote, advance: Callable[[int], None], stop: threading.Event
) -> tuple[Path, str | None]:
    """Gets a file of the Hub, or the rest of it: its .part file, and its SHA-256 if it is known."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging

    disable_progress_bars()  # `advance` moves a bar of ours
    logging.set_verbosity_error()  # an attempt that is repeated is no news
    known = get_hf_file_metadata(remote.url)
    version = re.sub(r"\W", "", known.etag or "")
    part = remote.path.with_name(f"{remote.path.name}.{version[:16]}.part")
    for other in part.parent.glob(f"{glob.escape(remote.path.name)}.*.part"):
        if other != part or not version:  # of another version, or of an unknown one
            other.unlink()
    if known.size is not None and part.exists() and part.stat().st_size > known.size:
        part.unlink()
    with _Part(part, advance, stop) as file:
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        http_get(
            remote.url, file, resume_size=file.tell(), headers=headers, expected_size=known.size
        )
    return part, version if _SHA256.fullmatch(version) else None


def _get_from_elsewhere(
    remote: Remote, advance: Callable[[int], None], stop: threading.Event
) -> tuple[Path, str | None]:
    """Gets a file that is not on the Hub from its beginning: its .part file and its SHA-256."""
    part = remote.path.with_name(f"{remote.path.name}.part")
    part.unlink(missing_ok=True)
    with requests.get(remote.url, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        with _Part(part, advance, stop) as file:
            for block in response.iter_content(BLOCK_BYTES):
                file.write(block)
    return part, remote.sha256


def _check(part: Path, sha256: str | None, remote: Remote) -> None:
    """Raises DataError unless a downloaded file is the one that is expected."""
    if remote.size not in (None, size := part.stat().st_size):
        raise DataError(f"{size} bytes, expected {remote.size}")
    if sha256 and (found := sha256_of(part)) != sha256:
        raise DataError(f"its SHA-256 is {found}, expected {sha256}")
    remote.check(part)


def _reason(error: Exception) -> str:
    """A few words on why a request failed: the status that the server gave, or the error's name."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return f"status {status}" if status else type(error).__name__
