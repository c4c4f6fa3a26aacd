"""Files from the web: what has come stays in NAME.part, and the next attempt goes on from there."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import requests

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import sha256_of, sync

AT_ONCE: Final = 4  # downloads
ATTEMPTS: Final = 5  # in a row without a single byte
FIRST_PAUSE_S: Final = 0.5  # between attempts; doubled each time
TIMEOUT_S: Final = (10, 30)  # to connect, and for the next bytes
BLOCK_BYTES: Final = 1 << 16

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+)")
_SHA256: Final = re.compile(r'"?([0-9a-f]{64})"?')


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A file on the web, and what it is to be here."""

    url: str
    path: Path
    check: Callable[[Path], object]  # DataError unless that is such a file; may mend its header
    size: int | None = None  # bytes, if known
    usual_size: int | None = None  # bytes of most files of its set, if that is all that is known
    limit: int | None = None  # bytes wanted from its beginning, if not all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """What a .part file is a part of; kept beside it."""

    url: str
    total: int | None  # bytes
    validator: str | None  # ETag or date, by which the server knows whether it has changed
    sha256: str | None


class _StoppedError(Exception):
    """Another download failed, or Ctrl-C came."""


def download_all(remotes: Sequence[Remote], advance: Callable[[int], None]) -> None:
    """Gets the files that are not here yet, a few at a time; DataError says what to do by hand.

    advance: called with the count of bytes that have come, from several threads.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(download, remote, advance, stop) for remote in remotes]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C too
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    errors = [e for future in done if (e := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, _StoppedError)):
        raise error


def download(
    remote: Remote,
    advance: Callable[[int], None] = lambda count: None,
    stop: threading.Event | None = None,
) -> None:
    """Gets a file unless it is here; it has its name only when all of it came and is right."""
    stop = stop or threading.Event()
    part = remote.path.with_name(f"{remote.path.name}.part")
    record = part.with_name(f"{part.name}.json")
    try:
        remote.path.parent.mkdir(parents=True, exist_ok=True)
        with requests.Session() as session:
            session.headers["Accept-Encoding"] = "identity"  # sizes are those of the file
            if _is_here(session, remote):
                advance(remote.path.stat().st_size)
                return
            origin = _Transfer(session, remote, part, record, advance, stop).run()
        try:
            _check(remote, part, origin)
        except DataError as e:
            part.unlink()
            raise DataError(f"{remote.url}: what came is not that file: {e}") from e
        sync(part)
        part.replace(remote.path)
        record.unlink(missing_ok=True)
    except requests.RequestException as e:  # these are OSErrors too
        raise _unreachable(remote, type(e).__name__) from e
    except OSError as e:
        raise DataError(
            f"cannot write {remote.path}: {e.strerror}; make room or choose another --out"
        ) from e


def get_json(url: str) -> Any:
    """What a web service answers; requests.RequestException or ValueError."""
    response = requests.get(url, timeout=TIMEOUT_S)
    response.raise_for_status()
    return response.json()


def _is_here(session: requests.Session, remote: Remote) -> bool:
    """Whether the file is here with the size it should have; asks the server if need be."""
    if not remote.path.exists():
        return False
    size = remote.path.stat().st_size
    if size in (remote.size, remote.usual_size) or size >= (remote.limit or sys.maxsize):
        return True
    if remote.size is not None:
        return False
    try:
        response = session.head(remote.url, timeout=TIMEOUT_S, allow_redirects=True)
    except requests.RequestException:
        if remote.usual_size is not None:
            raise  # it may be one that was cut
        remote.check(remote.path)
        return True
    total = response.headers.get("Content-Length", "")
    return response.ok and total.isdecimal() and size == _wanted(remote, int(total))


class _Transfer:
    """One file on its way into its .part file."""

    def __init__(
        self,
        session: requests.Session,
        remote: Remote,
        part: Path,
        record: Path,
        advance: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self._session = session
        self._remote = remote
        self._part, self._record = part, record
        self._advance, self._stop = advance, stop
        self._shown = 0  # bytes
        self._origin = _read_record(record, remote.url)

    def run(self) -> _Origin:
        """Makes the .part file as long as it should be, in as many attempts as it takes."""
        failures = 0
        while True:
            before = self._have()
            reason = "the connection was cut"
            try:
                if self._attempt(before) and self._origin:
                    return self._origin
            except requests.RequestException as e:
                reason = type(e).__name__
            failures = 1 if self._have() > before else failures + 1
            if failures == ATTEMPTS:
                raise _unreachable(self._remote, reason)
            if self._stop.wait(FIRST_PAUSE_S * 2 ** (failures - 1)):
                raise _StoppedError

    def _have(self) -> int:
        """Bytes that are here and can be gone on with."""
        if self._origin is None or self._origin.validator is None or not self._part.exists():
            return 0
        return self._part.stat().st_size

    def _attempt(self, have: int) -> bool:
        """Whether all is here after one request, which asks for what is missing."""
        origin = self._origin
        if origin and have and have >= _wanted(self._remote, origin.total):
            os.truncate(self._part, _wanted(self._remote, origin.total))
            return True
        headers = {}
        if have or self._remote.limit is not None:
            last = "" if self._remote.limit is None else str(self._remote.limit - 1)
            headers["Range"] = f"bytes={have}-{last}"
        if have and origin and origin.validator:
            headers["If-Range"] = origin.validator  # all of it if it has changed
        with self._session.get(
            self._remote.url, headers=headers, stream=True, timeout=TIMEOUT_S
        ) as response:
            self._refuse(response)
            start, total = _extent(response)
            if start not in (0, have) or (start and origin and total != origin.total):
                self._origin = None  # begin again
                return False
            if start == 0:
                origin = self._begin(response, total)
            return origin is not None and self._receive(response, start, origin)

    def _refuse(self, response: requests.Response) -> None:
        """DataError where asking again cannot help; HTTPError where it may."""
        status = response.status_code
        if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            return
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._origin = None  # the file has become shorter: begin again
        elif status != HTTPStatus.TOO_MANY_REQUESTS and status < 500:
            raise DataError(
                f"{self._remote.url}: the server answers {status} {response.reason}; if the file "
                f"has moved, get it by hand and put it here: {self._remote.path}"
            )
        raise requests.HTTPError(f"status {status}")

    def _begin(self, response: requests.Response, total: int | None) -> _Origin:
        self._part.unlink(missing_ok=True)  # so that it never lies beside another file's record
        self._origin = _Origin(
            url=self._remote.url,
            total=total,
            validator=_validator(response),
            sha256=_linked_sha256(response),
        )
        self._record.write_text(json.dumps(asdict(self._origin)))
        return self._origin

    def _receive(self, response: requests.Response, start: int, origin: _Origin) -> bool:
        wanted = _wanted(self._remote, origin.total)
        have = start
        with self._part.open("ab") as file:
            for block in response.iter_content(BLOCK_BYTES):
                if self._stop.is_set():
                    raise _StoppedError
                kept = block[: wanted - have]
                file.write(kept)
                have += len(kept)
                self._advance(have - self._shown)
                self._shown = have
                if have == wanted:
                    break
        return have == wanted or origin.total is None


def _wanted(remote: Remote, total: int | None) -> int:
    """Bytes that are to come, if the file has so many."""
    return min(size for size in (remote.limit, total, sys.maxsize) if size is not None)


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """Where the answer begins in the file, and the bytes of the whole file if it says so."""
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match:
            return int(match[1]), int(match[2])
        return -1, None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _validator(response: requests.Response) -> str | None:
    etag: str = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):  # a weak one allows other bytes
        return etag
    date: str | None = response.headers.get("Last-Modified")
    return date


def _linked_sha256(response: requests.Response) -> str | None:
    """The sum that huggingface.co names when it sends us on to where a large file lies."""
    for answer in (*response.history, response):
        if match := _SHA256.fullmatch(answer.headers.get("X-Linked-Etag", "")):
            return match[1]
    return None


def _read_record(record: Path, url: str) -> _Origin | None:
    with suppress(OSError, ValueError, TypeError):
        origin = _Origin(**json.loads(record.read_bytes()))
        if origin.url == url:
            return origin
    return None


def _check(remote: Remote, part: Path, origin: _Origin) -> None:
    size = part.stat().st_size
    if remote.size is not None and size != _wanted(remote, remote.size):
        raise DataError(f"{size} bytes, expected {_wanted(remote, remote.size)}")
    if origin.sha256 and size == origin.total and (found := sha256_of(part)) != origin.sha256:
        raise DataError(f"its SHA-256 is {found}, expected {origin.sha256}")
    remote.check(part)


def _unreachable(remote: Remote, reason: str) -> DataError:
    return DataError(
        f"cannot get {remote.url} ({reason}); give the same command again where there is a "
        f"network, or put that file here: {remote.path}"
    )
